"""`loracat env`: versions and devices, for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import version

from loracli.cli._options import JsonOpt, QuietOpt
from loracli.cli._output import Output

_PACKAGES = ("loracat", "torch", "transformers", "peft", "safetensors", "huggingface-hub", "typer", "rich")


def env(as_json: JsonOpt = False, quiet: QuietOpt = False) -> None:
    """Print versions and devices, for bug reports."""
    import torch

    out = Output(as_json=as_json, quiet=quiet)
    facts = {name: version(name) for name in _PACKAGES}
    facts["python"] = platform.python_version()
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts["threads"] = str(torch.get_num_threads())
    out.document({"env": facts})
    for name, value in facts.items():
        out.line(f"{name:16} {value}")
        out.value(f"{name}={value}")
