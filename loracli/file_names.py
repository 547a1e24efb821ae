"""Names of the files of an adapter and of an export."""

from __future__ import annotations

CONFIG_FILE = "adapter_config.json"
README_FILE = "README.md"
TENSOR_FILE = "adapter_model.safetensors"
MLX_TENSOR_FILE = "adapters.safetensors"
TENSOR_FILES = (TENSOR_FILE, MLX_TENSOR_FILE)
GGUF_FILE = "adapter.gguf"
CORES_FILE = "loracat-refit.cores"
