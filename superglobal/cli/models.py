"""Commands that load a network and write it in another form: convert-weights, export and share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from superglobal import __version__
from superglobal.errors import InputError

if TYPE_CHECKING:
    from superglobal.models.network import RetrievalNetwork

_EXPORT = """Export a network to ONNX or torch.export, e.g. superglobal export WEIGHTS FILE.onnx

The exported model takes (B, 3, H, W) float32 RGB in 0..1, normalizes, computes all scales and returns (B, D)
descriptors of unit norm; the metadata of the file says so. Without --size it accepts every image size, without --batch
every batch size. It is compared with the network on several sizes and kept only if they agree.
"""
_SHARE = """Write a model folder that others load with one line, e.g. superglobal share WEIGHTS FOLDER

FOLDER contains the weights, config.json and a model card with the settings of the training and the results. Load it
with superglobal.load_model("FOLDER") or evaluate it with `python eval.py weights=FOLDER`. If you push it to the Hugging
Face Hub, the name is "hf:owner/name".
"""


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"superglobal {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def convert_weights(arguments: Sequence[str]) -> int:
    """Convert a CVNet checkpoint to safetensors with its provenance."""
    parser = _parser("convert-weights", "Convert a CVNet checkpoint, e.g. CVPR2022_CVNet_R50.pyth r50.safetensors")
    parser.add_argument("source", type=Path, help="CVNet file (model_state with encoder_q.* or globalmodel.*)")
    parser.add_argument("target", type=Path, help="safetensors file to write")
    args = parser.parse_args(arguments)
    from superglobal.models.factory import load_model
    from superglobal.models.weights import read_weights, save_weights

    source = read_weights(args.source)
    if source.kind != "cvnet":
        raise InputError(f"{args.source}: no CVNet checkpoint; expected keys encoder_q.* or globalmodel.*")
    network = load_model(args.source, pooling="gem", scales=1)
    save_weights(network, args.target, {**source.provenance, "converter": f"superglobal {__version__}"}, False)
    print(f"{args.target}: {source.backbone}, whitening {source.dim}, {len(source.state)} tensors")
    if source.ignored:
        names = ", ".join(source.ignored[:3])
        print(f"ignored {len(source.ignored)} tensors of CVNet-Rerank ({names}, ...)")
    return 0


def export(arguments: Sequence[str]) -> int:
    """Export a network and print its differences from the original."""
    parser = _parser("export", _EXPORT)
    _add_network_arguments(parser)
    parser.add_argument("file", type=Path, help="file to write, .onnx or .pt2")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="fixed image size in pixels")
    parser.add_argument("--batch", type=int, help="fixed number of images")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a component (1e-4)")
    args = parser.parse_args(arguments)
    from superglobal.models.export import export_network

    size = (args.size[0], args.size[1]) if args.size else None
    for c in export_network(_load_network(args), args.file, size, args.batch, args.tolerance):
        batch, height, width = c.shape
        shape = f"{batch} x {height} x {width} px"
        print(f"{shape:>22}: lowest cosine {c.min_cosine:.7f}, largest difference {c.max_difference:.1e}")
    megabytes = args.file.stat().st_size / 1e6
    print(f"{args.file}: {megabytes:.1f} MB; images (B, 3, H, W) float32 RGB in 0..1 -> descriptors")
    return 0


def share(arguments: Sequence[str]) -> int:
    """Write a model folder, upload it if asked, and print how to use it."""
    parser = _parser("share", _SHARE)
    _add_network_arguments(parser)
    parser.add_argument("folder", type=Path, help="new or empty folder")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="results.json files, or folders of results")
    parser.add_argument("--license", default="unknown", help="of the weights, as on the Hub: cc-by-4.0, mit, ...")
    parser.add_argument("--name", help="title of the model card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args(arguments)
    folder: Path = args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already exists, expected a new or empty folder")
    from superglobal.models.hub import model_card, push_to_hub, save_pretrained
    from superglobal.reporting.model_card import read_card_results

    network = _load_network(args)
    results = read_card_results(args.results, network)
    card = model_card(network, results=results, license=args.license, name=args.name, repo_id=args.push)
    save_pretrained(network, folder, card)
    print(f'{folder}: superglobal.load_model("{folder}"), python eval.py weights={folder}')
    if args.push:
        url = push_to_hub(network, args.push, card, private=args.private or None)
        print(f'{url}: superglobal.load_model("hf:{args.push}"), python eval.py weights=hf:{args.push}')
    return 0


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", help="as weights= of eval.py: a path, hf:owner/name, timm, package or random")
    parser.add_argument("--backbone", help="timm name of the backbone, if the weights do not say it")
    parser.add_argument("--pooling", help="gem, superglobal or cvnet_global; that of the weights by default")
    parser.add_argument("--scales", help="1, 3, 5 or a list such as 0.7071,1.0; those of the weights, or 3, by default")


def _load_network(args: argparse.Namespace) -> RetrievalNetwork:
    from superglobal.models.factory import load_model

    return load_model(args.weights, backbone=args.backbone, pooling=args.pooling, scales=_scales(args.scales))


def _scales(text: str | None) -> int | list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")] if "," in text or "." in text else int(text)
    except ValueError as error:
        raise InputError(f"--scales {text}: expected 1, 3, 5 or a list such as 0.7071,1.0") from error
