"""Models in and out."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .command import RUN, Arguments, Command, argument, say, table


def _convert(arguments: Arguments) -> int:
    from ..models.build import locate_model
    from ..models.convert.files import convert_file, export_original

    source, out = Path(arguments.file), Path(arguments.out) if arguments.out else None
    if source.is_dir():
        if out is None:
            raise UserError("no file to write", where=source, fix="give one: tokar convert MODEL OUT.safetensors")
        family = export_original(locate_model(source), out, arguments.family)
        return say(f"{out}: {family.name} in its original layout")
    report = convert_file(source, out, arguments.family)
    rows = [("family", report.family), ("weights under", report.wrapper or "(bare)"), ("tensors", report.tensors),
            ("parameters", f"{report.parameters:,}"), ("dropped", ", ".join(report.dropped) or "nothing"),
            ("written", report.folder or "nothing; give a folder to write the model")]  # fmt: skip
    return table(rows)


def _parity(arguments: Arguments) -> int:
    from ..models.convert.parity import run_parity

    reports = [run_parity(Path(file)) for file in arguments.files]
    rows = [(report.file.name, report.family, item.name, item.note or f"{item.difference:.2e}", item.verdict)
            for report in reports for item in report.comparisons]  # fmt: skip
    table([("file", "family", "output", "largest difference", ""), *rows])
    return 0 if all(report.ok for report in reports) else 1


def _export(arguments: Arguments) -> int:
    from ..evaluate.card import export_card
    from ..models.build import export_model

    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("is not empty", where=out, fix="give a new folder")
    source, ema = Path(arguments.run), not arguments.raw
    if arguments.hf:
        tokenizer = Path(arguments.decode_with) if arguments.decode_with else None
        return say(f"{export_card(source, out, ema=ema, tokenizer=tokenizer)}: model, config and card")
    if arguments.decode_with:
        raise UserError("goes along with --hf alone", where="--decode-with", fix="add --hf, or leave it out")
    return say(f"{export_model(source, out, ema=ema)}: model and config")


COMMANDS = (
    Command("convert", "read published weights into a model folder, or write a model in its original layout", _convert,
            (argument("file", metavar="FILE", help="a published checkpoint, or a model to write back"),
             argument("out", nargs="?", metavar="OUT", help="folder to write; without it only say what was found"),
             argument("--family", metavar="NAME", help="recognised from the keys when not given")),
            example="tokar convert vq_ds16_c2i.pt models/vq16"),
    Command("parity", "compare our models with the original's answers", _parity,
            (argument("files", nargs="+", metavar="FILE", help="weights, inputs and answers in one safetensors file"),),
            example="tokar parity llamagen_vq.safetensors"),
    Command("export", "write the weights of a run as a model folder", _export,
            (argument("run", metavar="RUN", help=RUN), argument("out", metavar="OUT", help="a new folder"),
             argument("--raw", action="store_true", help="the trained weights instead of their average (EMA)"),
             argument("--hf", action="store_true", help="a folder to publish: with a model card, and a generator's tokenizer"),
             argument("--decode-with", metavar="TOKENIZER", help="with --hf: where the tokenizer of a generator lies now")),
            example="tokar export runs/digits_llamagen models/digits --hf"),
)  # fmt: skip
