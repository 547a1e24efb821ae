"""What every room stands on: files that appear whole or not at all, strict JSON, safetensors, the machine."""
