"""Define the commands that load a network and write it in another format: convert-weights, export and share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from superglobal import __version__
from superglobal.errors import InputError

if TYPE_CHECKING:
    from superglobal.models.network import RetrievalNetwork

_EXPORT = """Export a network to ONNX or torch.export.

Example: superglobal export WEIGHTS FILE.onnx

The input of the exported model is a batch of RGB images, (B, 3, H, W) float32 from 0 to 1. The output is (B, D)
descriptors of unit norm. The model includes the normalization of the pixels and the extraction at all scales. The
metadata of the file describes the input and the output. Without --size, the model accepts any image size, and without
--batch any batch size. The command compares the exported model with the network on images of several sizes, and writes
the file only if their descriptors agree within --tolerance.
"""
_SHARE = """Write a model folder that others can load with one line of code.

Example: superglobal share WEIGHTS FOLDER

The folder contains the weights, config.json, and a model card with the training settings and the results. Load it with
superglobal.load_model("FOLDER"), or evaluate it with `python eval.py weights=FOLDER`. With --push, the folder is also
uploaded to the Hugging Face Hub, where "hf:owner/name" takes the place of FOLDER.
"""


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    """Create the argument parser of `superglobal <command>`. The caller adds the arguments."""
    return argparse.ArgumentParser(
        f"superglobal {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def convert_weights(arguments: Sequence[str]) -> int:
    """Run `superglobal convert-weights`: convert a CVNet checkpoint to safetensors, and return the exit status.

    The metadata of the new file records the source of the weights.
    """
    description = (
        "Convert a CVNet checkpoint to safetensors.\n\n"
        "Example: superglobal convert-weights CVPR2022_CVNet_R50.pyth r50.safetensors"
    )
    parser = _parser("convert-weights", description)
    parser.add_argument(
        "source", type=Path, help="CVNet checkpoint, with the keys encoder_q.* or globalmodel.* in model_state"
    )
    parser.add_argument("target", type=Path, help="safetensors file to write")
    args = parser.parse_args(arguments)
    from superglobal.models.factory import load_model
    from superglobal.models.weights import read_weights, save_weights

    source = read_weights(args.source)
    if source.kind != "cvnet":
        raise InputError(
            f"{args.source}: not a CVNet checkpoint; expected the keys encoder_q.* or globalmodel.*. Give a file of "
            "the CVNet authors, such as CVPR2022_CVNet_R50.pyth"
        )
    network = load_model(args.source, pooling="gem", scales=1)
    save_weights(network, args.target, {**source.provenance, "converter": f"superglobal {__version__}"}, False)
    print(f"Wrote {args.target}: {source.backbone}, {source.dim} dimensions, {len(source.state)} tensors")
    if source.ignored:
        names = ", ".join(source.ignored[:3])
        print(f"Ignored {len(source.ignored)} tensors of CVNet-Rerank ({names}, ...)")
    return 0


def export(arguments: Sequence[str]) -> int:
    """Run `superglobal export`: export a network to ONNX or torch.export, and return the exit status.

    Print how much the descriptors of the exported model differ from those of the network.
    """
    parser = _parser("export", _EXPORT)
    _add_network_arguments(parser)
    parser.add_argument("file", type=Path, help="file to write, .onnx or .pt2")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="accept only images of this size, in pixels"
    )
    parser.add_argument("--batch", type=int, help="fixed number of images per batch")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="maximum difference in any descriptor component between the network and the exported model "
        "(default: 1e-4)",
    )
    args = parser.parse_args(arguments)
    from superglobal.models.export import export_network

    size = (args.size[0], args.size[1]) if args.size else None
    for c in export_network(_load_network(args), args.file, size, args.batch, args.tolerance):
        batch, height, width = c.shape
        shape = f"{batch} x {height} x {width} px"
        print(f"{shape:>22}: lowest cosine {c.min_cosine:.7f}, largest difference {c.max_difference:.1e}")
    megabytes = args.file.stat().st_size / 1e6
    print(f"Wrote {args.file}: {megabytes:.1f} MB; input: images (B, 3, H, W) float32 RGB in 0..1; output: descriptors")
    return 0


def share(arguments: Sequence[str]) -> int:
    """Run `superglobal share`: write a model folder, upload it if requested, and return the exit status."""
    parser = _parser("share", _SHARE)
    _add_network_arguments(parser)
    parser.add_argument("folder", type=Path, help="new or empty folder to write")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        help="results for the model card: results.json files, or folders that contain them",
    )
    parser.add_argument(
        "--license", default="unknown", help="license of the weights, in the Hub's notation: cc-by-4.0, mit, ..."
    )
    parser.add_argument("--name", help="title of the model card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="repository of the Hub to upload the folder to")
    parser.add_argument("--private", action="store_true", help="if --push creates the repository, make it private")
    args = parser.parse_args(arguments)
    folder: Path = args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already exists; expected a new or empty folder, so choose another name")
    from superglobal.models.hub import model_card, push_to_hub, save_pretrained
    from superglobal.reporting.model_card import read_card_results

    network = _load_network(args)
    results = read_card_results(args.results, network)
    card = model_card(network, results=results, license=args.license, name=args.name, repo_id=args.push)
    save_pretrained(network, folder, card)
    print(f'Wrote {folder}. Load it by superglobal.load_model("{folder}") or python eval.py weights={folder}')
    if args.push:
        url = push_to_hub(network, args.push, card, private=args.private or None)
        hub = f"hf:{args.push}"
        print(f'Uploaded {url}. Load it by superglobal.load_model("{hub}") or python eval.py weights={hub}')
    return 0


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select the weights, backbone, pooling and scales of a network to `parser`."""
    parser.add_argument(
        "weights", help="weights of the network, as for eval.py: a path, hf:owner/name, timm, package or random"
    )
    parser.add_argument(
        "--backbone", help="name of the backbone in timm; needed if the weights file does not contain this name"
    )
    parser.add_argument(
        "--pooling", help="pooling: gem, superglobal or cvnet_global; by default, the pooling that the weights contain"
    )
    parser.add_argument(
        "--scales",
        help="number of scales (1, 3 or 5), or a list of scale factors such as 0.7071,1.0; by default, the scales that "
        "the weights contain, or else 3 scales",
    )


def _load_network(args: argparse.Namespace) -> RetrievalNetwork:
    """Load a network with the weights, backbone, pooling and scales that were given on the command line."""
    from superglobal.models.factory import load_model

    return load_model(args.weights, backbone=args.backbone, pooling=args.pooling, scales=_scales(args.scales))


def _scales(text: str | None) -> int | list[float] | None:
    """Parse the value of `--scales`: a number of scales, or a list of scale factors separated by commas."""
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")] if "," in text or "." in text else int(text)
    except ValueError as error:
        raise InputError(f"--scales {text}: expected 1, 3, 5 or a list such as 0.7071,1.0") from error
