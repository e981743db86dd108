"""Post-training quantization: ranges and Q/DQ placement (to come)."""
