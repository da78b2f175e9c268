"""`steadystate plan`: what a model takes, and how many sequences fit on given GPUs.

From config.json alone: no weights are read, no GPU is needed. Exit codes: 0; 1 when the model's
config.json cannot be had or is not served; 2 for a command line that makes no sense.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from server.cli.flags import add_flags, settings_of
from server.settings import Settings

if TYPE_CHECKING:
    from model.plan import Plan

SETTINGS = (
    *("revision", "hub_token", "hub_cache", "hub_offline"),
    *("dtype", "quantization", "state_dtype", "ring", "memory_fraction", "max_step_tokens"),
)
GB = 1_000_000_000


def add_parser(commands: Any) -> None:
    """Add this command to the console script."""
    parser = commands.add_parser(
        "plan",
        help="say what a model takes and how many sequences fit",
        description="Say what a model takes and how many sequences fit on given GPUs, from its "
        "config.json alone.",
    )
    parser.add_argument(
        "path",
        metavar="MODEL",
        help="checkpoint directory, config.json, name of a bundled model, or id on the hub",
    )
    parser.add_argument(
        "--gpu",
        default="h200",
        metavar="NAME",
        help="kind of GPU, or the GB of memory that one has (default: h200)",
    )
    parser.add_argument("--gpus", type=_count, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument(
        "--context", type=_count, metavar="T", help="tokens of a sequence; default: a table"
    )
    parser.add_argument(
        "--concurrency",
        type=_count,
        metavar="B",
        help="sequences at a time, as serve's --max-running (default: 256)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    add_flags(parser, SETTINGS)
    parser.set_defaults(run=lambda arguments: _command(parser, arguments))


def _command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    path = Path(arguments.path)
    model = str(path.parent) if path.name == "config.json" and path.is_file() else arguments.path
    try:
        settings = settings_of(arguments, model=model)
    except ValueError as error:
        parser.error(str(error))
    try:
        made = _plan(settings, arguments)
    except ValueError as error:  # a config.json that cannot be had, or is not served
        print(f"steadystate plan: {error}", file=sys.stderr)
        return 1
    except LookupError as error:  # a GPU that is not known, a context that the model has not
        parser.error(str(error.args[0]))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(_fields(made))).decode())
    else:
        print("\n".join(_lines(made, arguments.gpu.lower())))
    return 0


def _plan(settings: Settings, arguments: argparse.Namespace) -> Plan:
    """The plan that was asked for. ValueError for the model, LookupError for the rest."""
    from model.config import Fields
    from model.plan import CONTEXTS, GPUS, footprint, plan

    gpu_bytes = _gpu_bytes(arguments.gpu, GPUS)
    directory = settings.model_path
    if settings.hub_id is not None:
        from server.hub import Repository

        directory = Repository(settings).config()
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    taken = footprint(
        Fields.read(directory), dtype=dtype, state_dtype=settings.state_dtype, ring=settings.ring
    )
    context = arguments.context
    if context is not None and context > (taken.max_positions or context):
        raise LookupError(
            f"--context: the model has {taken.max_positions} positions, got {context}"
        )
    return plan(
        taken,
        gpu_bytes=gpu_bytes,
        gpus=arguments.gpus,
        quantization=settings.quantization,
        max_running=arguments.concurrency or 256,
        memory_fraction=settings.memory_fraction,
        step_tokens=settings.max_step_tokens or 8192,
        contexts=CONTEXTS if context is None else (context,),
    )


def _gpu_bytes(name: str, known: dict[str, int]) -> int:
    if name.lower() in known:
        return known[name.lower()]
    try:
        size = float(name.lower().removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise LookupError(f"--gpu: {', '.join(known)}, or GB of memory, got {name!r}")
    return int(size * GB)


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 1 << 40:
        raise argparse.ArgumentTypeError(f"from 1 to {1 << 40}, got {text}")
    return value


def _fields(made: Plan) -> dict[str, Any]:
    """A plan as JSON has it: every number in bytes, tokens or pieces."""
    fields: dict[str, Any] = msgspec.to_builtins(made)
    return {**fields, "fits": made.fits, "gpus_needed": made.gpus_needed}


def _lines(made: Plan, gpu: str) -> list[str]:
    """A plan as people read it."""
    f, gpus = made.footprint, made.gpus
    others = [name for name in f.weights if name != made.quantization]
    pays_off = f"more from {f.pays_off:,} tokens on" if f.pays_off else "never more"
    lines = [
        f"{f.architecture}, {f.layers} layers, on {gpus} x {gpu} of {_size(made.gpu_bytes)}",
        "",
        _line("weights", f.weights[made.quantization], made.weights if gpus > 1 else None)
        + f"{_quantized(made.quantization)}; "
        + ", ".join(f"{_size(f.weights[name])} {_quantized(name)}" for name in others),
        _line("workspace", made.workspace * gpus, made.workspace if gpus > 1 else None)
        + "CUDA, activations of a step, sampling: estimated",
        _line("sequences", made.budget * gpus, made.budget if gpus > 1 else None)
        + "what is left for states and KV",
        "",
        _line("state", f.slot, made.slot if gpus > 1 else None) + "of a sequence, at any length",
    ]
    if f.block:
        share = made.block / f.block_size if gpus > 1 else None
        lines.append(_line("KV", f.block / f.block_size, share) + "of a token")
    lines += [
        _line("full attention", f.full_token)
        + f"of a token, in a model of this shape ({f.kv_heads} KV heads): {pays_off}",
        "",
    ]
    if not made.fits:
        enough = f"{made.gpus_needed} would do" if made.gpus_needed else "nor on any number of them"
        return [*lines, f"Not one sequence fits on {gpus} x {gpu}; {enough}."]
    blocks = f" and {made.blocks:,} KV blocks of {f.block_size} tokens" if f.block else ""
    lines += [
        f"--max-running {made.max_running}: {made.slots:,} slots{blocks}; "
        f"all of them at once {_reach(made)}; "
        f"with full attention {made.full_longest:,} tokens each",
        "",
        f"{'':>12}  {'here':>24}  {'with full attention':>24}",
        f"{'context':>12}" + 2 * f"  {'a sequence':>12}{'sequences':>12}",
    ]
    for row in made.rows:
        lines.append(
            f"{row.context:>12,}  {_size(row.bytes):>12}{row.sequences:>12,}"
            f"  {_size(row.full_bytes):>12}{row.full_sequences:>12,}"
        )
    if gpus > 1:
        lines += ["", "An even split over the GPUs is assumed; serve itself takes one GPU."]
    return lines


def _reach(made: Plan) -> str:
    if made.longest is None:
        return "of any length"
    return f"of {made.longest:,} tokens each" if made.longest else "do not fit"


def _line(name: str, total: float, each: float | None = None) -> str:
    share = f"{_size(each)} a GPU" if each is not None else ""
    return f"{name:<15}{_size(total):>10}  " + (f"{share:<16}  " if share else "")


def _quantized(name: str) -> str:
    return "unquantised" if name == "none" else f"in {name}"


def _size(count: float) -> str:
    """Bytes with three or four digits that count: 293.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
