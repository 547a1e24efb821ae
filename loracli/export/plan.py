"""One adapter directory: its layout and the rank of every module, and then its files, module by module."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loracli._version import __version__
from loracli.adapters.adapter import kernels_of
from loracli.adapters.base_module import BaseModule
from loracli.adapters.names import PREFIX, target_of
from loracli.adapters.tasks import head_size
from loracli.algebra.concatenate import pad_rank
from loracli.algebra.factors import Factors
from loracli.algebra.packing import join_experts, join_groups
from loracli.algebra.truncate import spectrum
from loracli.composition.card import EXPORT_FORMAT, EXPORT_SCHEMA, Certificate, ModuleCertificate, closed
from loracli.composition.composition import Composition
from loracli.errors import IntegrityError, RecipeError, UsageError
from loracli.export.activations import Moments
from loracli.export.card import model_card
from loracli.export.gguf import gguf_names, write_gguf
from loracli.export.layout import Layout, choose_layout, ranks_of_targets
from loracli.export.module import ModuleExport, cut_module, module_export
from loracli.export.options import OUTPUT_DTYPES, ExportOptions, choose_ranks, choose_uniform_rank, spectra_of_targets
from loracli.export.refit import Refitted, write_cores
from loracli.progress import Progress
from loracli.system.document import dtype_name
from loracli.system.files import CERTIFICATE_FILE, CONFIG_FILE, CORES_FILE, GGUF_FILE, README_FILE, write_file
from loracli.system.machine import in_order
from loracli.system.tensor_file import file_size, open_tensor_file, write_tensors

TASK = "export"


class AdapterPlan:
    """One export: what is computed for each module, and where it goes.

    `refitted` are the cores of the cut, once they are found. A module whose rank is not known beforehand is composed at
    once and held in the output's dtype.
    """

    def __init__(
        self,
        composition: Composition,
        options: ExportOptions,
        moments: Moments | None,
        progress: Progress,
        *,
        workers: int,
    ) -> None:
        self._moments: Mapping[str, Tensor] = {} if moments is None else moments.by_module
        self._moments_from = None if moments is None else moments.origin
        self.refitted: Refitted | None = None
        self._composition, self._options, self._progress, self._workers = composition, options, progress, workers
        self.dtype = OUTPUT_DTYPES[options.dtype] if options.dtype else composition.dtype
        self._table: dict[str, BaseModule] = {module.name: module for module in composition.base.modules}
        self._rank = options.rank or max(max(adapter.ranks) for adapter in composition.adapters)
        self._held: dict[str, ModuleExport] = {}
        names = composition.names()
        missing = sorted({target_of(name) for name in names} - self._table.keys())
        if missing:
            raise RecipeError(f"the recipe's table of base modules lacks {missing[0]}, which an adapter changes")
        progress.begin(TASK, len(names) * (1 if options.rule is None else 2), "modules")
        self._cuts: dict[str, int] = {}  # ranks that modules are cut to
        uniform = self._choose_cuts(names, options)
        self._ranks = {name: self._rank_of(name) for name in names}
        self.layout = self._layout(self._ranks, uniform)
        self._hashes: dict[str, str] = {}  # of files beside the tensors
        if options.gguf is not None:
            if self.layout.lora_bias or self.layout.modules_to_save:
                kept = "lora_bias" if self.layout.lora_bias else "modules_to_save"
                raise UsageError(f"a GGUF adapter cannot hold the {kept} of this composition", hint="leave out --gguf")
            self._gguf_names = gguf_names(options.gguf, {name: self._table[name] for name in self.layout.ranks})

    def _layout(self, ranks: Mapping[str, int], rank: int | None = None) -> Layout:
        saved, adapters = self._composition.saved, self._composition.adapters
        return choose_layout(
            self._composition.base.modules,
            ranks,
            self._options.profile,  # type: ignore[arg-type]
            rank=rank,
            lora_bias=next((adapter.reference for adapter in adapters if adapter.config.lora_bias), None),
            saved=() if saved is None else saved.modules,
            kernels=kernels_of(adapters),
            task_type=self._composition.task_type,
        )

    def _choose_cuts(self, names: Sequence[str], options: ExportOptions) -> int | None:
        """Sets the ranks to cut to, and gives the one rank of a uniform layout where that was decided on.

        A layout of one rank takes one for all, because less would be filled up; `peft` takes one for each module, and
        for the experts of a parameter or the groups of a convolution together.
        """
        if not options.merge:
            return None
        if options.rule is None:
            self._cuts = dict.fromkeys(names, self._rank)
            return options.rank
        work = in_order(self._spectrum, names, workers=self._workers)
        spectra = dict(zip(names, work, strict=True))
        most = {name: len(squares) for name, squares in spectra.items()}

        def size(layout: Layout) -> int:
            return file_size(self.shapes(layout), self.dtype)

        if self._layout(most).profile == "peft":
            if options.rule.tolerance is None:  # which holds for each update; the others for what a file has
                spectra = spectra_of_targets(spectra)
            updates = Counter(target_of(name) for name in names)
            costs = {target: count * self._bytes_of_a_rank(target) for target, count in updates.items()}

            def cuts(ranks: Mapping[str, int]) -> dict[str, int]:
                of_targets = ranks_of_targets(ranks)
                return {name: of_targets[target_of(name)] for name in names}

            self._cuts = cuts(choose_ranks(options.rule, spectra, costs, lambda ranks: size(self._layout(cuts(ranks)))))
            return None
        uniform = choose_uniform_rank(options.rule, spectra, lambda rank: size(self._layout(most, rank)))
        self._cuts = dict.fromkeys(names, uniform)
        return uniform

    def _spectrum(self, name: str) -> Tensor:
        found = spectrum(self._composition.compose(name).factors)
        self._progress.advance(TASK, 1)
        return found

    def _bytes_of_a_rank(self, name: str) -> int:
        module = self._table[target_of(name)]
        return (module.in_features + module.out_features) * self.dtype.itemsize

    @property
    def merged(self) -> bool:
        """Whether something was cut off."""
        return self._options.merge or any(made.certificate.kept_energy < 1 for made in self._held.values())

    def _rank_of(self, name: str) -> int:
        total = self._composition.known_rank(name)
        module = self._table[target_of(name)]
        if self._options.rule is not None:
            return min(self._cuts[name], total or self._cuts[name], module.in_features, module.out_features)
        if total is None:
            self._held[name] = self._export(name)
            self._progress.advance(TASK, 1)
            return self._held[name].factors.rank
        if not self._options.merge:
            return total
        return min(self._rank, total, module.in_features, module.out_features)

    def _export(self, name: str) -> ModuleExport:
        return module_export(
            self._composition,
            name,
            self.dtype,
            rank=self._cuts.get(name),
            moment=self._moments.get(name),
            refit=self._cores.get(name),
        )

    @property
    def _cores(self) -> Mapping[str, Tensor]:
        return {} if self.refitted is None else self.refitted.cores

    def cut(self) -> dict[str, Factors]:
        """Every module cut, in float64, with sqrt(S) on both sides."""

        def work(name: str) -> Factors:
            return cut_module(self._composition, name, self._cuts[name], self._moments.get(name)).factors

        return dict(zip(self._ranks, in_order(work, self._ranks, workers=self._workers), strict=True))

    def write(self, folder: Path) -> tuple[Certificate, int]:
        """Writes every file into an empty directory; returns the certificate and the bytes of the tensor file.

        Raises:
            UsageError: if a value overflows the output's dtype.
            IntegrityError: if an ingredient changes meanwhile, or what was written reads back otherwise.
        """
        certificates: list[ModuleCertificate] = []
        factors: dict[str, Factors] = {}  # of the module being written
        places = self.layout.places(self._table)
        order = dict.fromkeys(places[name].module for name in sorted(places))  # that in which tensors are asked for
        made = in_order(self._module, order, workers=self._workers)

        def tensor(name: str) -> Tensor:
            if name in self._whole:
                return self._saved_parameter(self._whole[name])
            place = places[name]
            if place.module not in factors:
                factors.clear()
                factors[place.module] = self._written(next(made), certificates)
            return place.tensor_of(factors[place.module])

        path = folder / self.layout.tensor_file
        write_tensors(path, self.shapes(self.layout), self.dtype, tensor)
        certificate = Certificate(tuple(certificates), self._read_back(path))
        if self._options.gguf is not None:
            self._hashes[GGUF_FILE] = write_gguf(
                folder / GGUF_FILE, self._options.gguf, self._gguf_names, path, self.layout.places(self._table)
            )
        if self._cores:
            self._hashes[CORES_FILE] = write_cores(folder / CORES_FILE, self._cores)
        card = model_card(
            self._composition.card(),
            self.layout,
            certificate,
            merged=self.merged,
            options=self._repeated_options(),
            labels=None if self._composition.saved is None else head_size(self._composition.saved.shapes),
        )
        config = self.layout.config(self._composition.base.id, self._table)
        texts = {CONFIG_FILE: _json(config), README_FILE: card.encode()}
        for name, data in texts.items():
            write_file(folder / name, data)
        write_file(folder / CERTIFICATE_FILE, _json(closed(self._document(certificate, texts))))
        self._progress.finish(TASK)
        return certificate, path.stat().st_size

    def shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Of every tensor in the file."""
        shapes: dict[str, tuple[int, ...]] = {n: place.shape for n, place in layout.places(self._table).items()}
        saved = self._composition.saved
        return shapes if saved is None else shapes | {n: saved.shapes[path] for n, path in self._whole.items()}

    @property
    def _whole(self) -> dict[str, str]:
        """Names in the file of the parameters that replace the base's, with their paths in it."""
        return (
            {} if self._composition.saved is None else {PREFIX + path: path for path in self._composition.saved.sources}
        )

    def _saved_parameter(self, path: str) -> Tensor:
        assert self._composition.saved is not None
        written = self._composition.saved.read(path).to(self.dtype)
        if not bool(torch.isfinite(written).all()):
            raise UsageError(f"{path} overflows {self.dtype}", hint="export with --dtype float32 or bfloat16")
        return written

    def _module(self, name: str) -> tuple[Factors, tuple[ModuleCertificate, ...]]:
        """The factors of a module, of all experts of a parameter or all groups of a convolution, as they go into the
        file, with a certificate for each update; none where it only pads the layout."""
        rank = self.layout.ranks[name]
        if name in self.layout.experts or name in self.layout.convolutions:
            made = [self._made(update) for update in self.layout.updates_of(name)]
            join = join_experts if name in self.layout.experts else join_groups
            return join([one.factors for one in made], rank), tuple(one.certificate for one in made)
        if name not in self._ranks:
            module = self._table[name]
            zeros = Factors(torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank))
            return zeros.to(self.dtype), ()
        one = self._made(name)
        return pad_rank(one.factors, rank), (one.certificate,)

    def _made(self, name: str) -> ModuleExport:
        return self._held[name] if name in self._held else self._export(name)

    def _written(
        self, made: tuple[Factors, tuple[ModuleCertificate, ...]], certificates: list[ModuleCertificate]
    ) -> Factors:
        certificates += made[1]
        self._progress.advance(TASK, sum(certificate.name not in self._held for certificate in made[1]))
        return made[0]

    def _read_back(self, path: Path) -> str:
        """The sha256 of the file, after the safetensors library has read every tensor of it in the planned shape."""
        shapes = self.shapes(self.layout)
        file = open_tensor_file(path, any_shape=lambda name: len(shapes.get(name, ())) != 2)
        with file.reader() as reader:
            found = {name: tuple(reader.read(name).shape) for name in file.shapes}
        if found != shapes:
            raise IntegrityError(f"{path.name} reads back with other shapes than were written")
        return file.sha256

    def _document(self, certificate: Certificate, texts: Mapping[str, bytes]) -> dict[str, Any]:
        return {
            EXPORT_FORMAT: EXPORT_SCHEMA,
            **self._composition.document(),
            "versions": {"loracat": __version__, "torch": torch.__version__},
            "export": {
                "profile": self.layout.profile,
                "merged": self.merged,
                "rank": self.layout.rank,
                "dtype": dtype_name(self.dtype),
                **self._rule(),
                **({"refit": True} if self._cores else {}),
                "options": self._repeated_options(),
            },
            **({} if self.refitted is None else {"refit": dataclasses.asdict(self.refitted.record)}),
            "certificate": {
                "sha256": {self.layout.tensor_file: certificate.sha256, **self._hashes},
                "largest_relative_error": certificate.largest_error,
                "modules": [dataclasses.asdict(module) for module in certificate.modules],
            },
            "text_sha256": {name: sha256(data).hexdigest() for name, data in texts.items()},
        }

    def _rule(self) -> dict[str, float | int | str | None]:
        """What decided on ranks and cuts, by the name of its option."""
        if self._options.activation_aware:
            return {"activation_aware": True, "moments": self._moments_from}
        if self._options.rule is None:
            return {}
        return {name: value for name, value in dataclasses.asdict(self._options.rule).items() if value is not None}

    def _repeated_options(self) -> str:
        chosen = self._options
        words = [" --merge"] if chosen.merge else []
        rank = self._rank if chosen.merge else chosen.rank
        decided = {"rank": rank} if chosen.rule is None else self._rule()
        words += [" --activation-aware"] if chosen.activation_aware else []
        words += self._records_options()
        for name, value in (*decided.items(), ("dtype", chosen.dtype), ("profile", chosen.profile)):
            words += [] if value is None else [f" --{name} {value}"]
        words += [] if chosen.gguf is None else [" --gguf"]
        return "".join(words)

    def _records_options(self) -> list[str]:
        """Options about records: FILE is fitted on, HELD_OUT is not; a method that searches names its FILE itself."""
        searched = (method := self._composition.method) is not None and method.search is not None
        refit = None if self.refitted is None else self.refitted.record
        apart = refit is not None and not refit.divided
        fitted = apart or self._moments_from == "records"
        words = [] if refit is None else [" --refit"]
        words += [" --fit-data FILE"] if fitted and not searched else []
        if apart:
            words.append(" --data HELD_OUT")
        elif refit is not None and not fitted and not searched:
            words.append(" --data FILE")
        return words


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
