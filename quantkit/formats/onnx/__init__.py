"""ONNX: graphs of ONNX Runtime."""
