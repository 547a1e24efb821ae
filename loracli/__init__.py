"""loracat: several LoRA adapters in, one out, with mixing weights learnt on a small calibration file."""

__version__ = "0.1.0"
