"""Post-training quantization to INT8: from an FP32 ONNX file to one with Q/DQ nodes.

What is ours and what is a library's was settled by trying both on this graph (mat-tiny-256,
untrained, two cores; mean PSNR in the hole against FP32 over the first eight hard masks, four of
which the libraries were given to calibrate on):

- nvidia-modelopt 0.47 quantizes by operator type: 408 pairs, among them on the masks themselves,
  on attention's logits, on norms and on the energies of demodulation. 16.9 dB, 116 s for four
  images; and it pins onnx 1.21 and an older ONNX Runtime for CUDA (6 GB installed).
- onnxruntime.quantization 1.32 quantizes the nodes it is told to. With our 36 layers 32.2 dB by
  min-max and by entropy, which give the same file (it looks for the best of as many bins as
  levels, and that is all of them), and 28.5 dB by percentile; 7 to 12 s for four images. But its
  writer hands the quantized tensor to every reader, those told to stay FP32 too; it holds every
  activation of every image at once; and it takes no ranges but those it measures itself.
- Ours: 35.0 dB with the same layers, calibrated on other pictures and masks.

So the few dozen lines that place nodes and find ranges are ours, and ONNX Runtime is what runs
everything: every error and decibel here is measured with its quantizing operators.

`candidates` says what may be quantized and `samples` what it is calibrated on; `equalizing` makes
channels alike, `histograms` and `ranges` find scales, `sensitivity` what each layer costs,
`recipe` decides, `placement` writes, and `calibrate` is all of it.
"""
