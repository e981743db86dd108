"""Export of MAT to ONNX, its two custom operators, parity, and the inpainting pipeline.

Modules that run exported models (`contract`, `runners`, `inpaint`, `parity`) need no torch; those
that make them (`ops`, `inference`, `export`) do, and are imported on use.
"""
