"""`evenmix sample`: draw pictures for prompts with a trained model."""

import argparse
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image, PngImagePlugin

from pipeline.errors import EvenmixError
from train.checkpoint import load_averaged
from train.config import TrainConfig, load_config
from train.frozen import FrozenEncoders
from train.grid import draw_grid
from train.model import Params, velocity_fn
from train.output import writing_to
from train.prompts import read_prompts
from train.sampling import SamplingConfig, sample
from train.sharding import cut, make_mesh, place_state, shardings_of
from train.weights import load_weights

DEFAULTS = SamplingConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="output of a run, or a file of weights (.safetensors, or i1's .pt)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="for a file of weights: the TOML file of such a run"
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, or what `evenmix rewrite` wrote (.jsonl)",
    )
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument(
        "--guidance",
        type=float,
        default=DEFAULTS.guidance,
        help="scale of guidance; 1 turns it off (%(default)s)",
    )
    parser.add_argument(
        "--rescale",
        type=float,
        default=DEFAULTS.rescale,
        help="strength of guidance rescaling, 0 to 1 (%(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=DEFAULTS.steps, help="Euler steps (%(default)s)"
    )
    shift_help = "time shift; below 1 puts more steps near the noise (%(default)s)"
    parser.add_argument("--shift", type=float, default=DEFAULTS.shift, help=shift_help)
    parser.add_argument(
        "--seed", type=int, default=DEFAULTS.seed, help="seed of the noise (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Sample, and write each picture and a grid of all as PNG."""
    prompts = args.prompt or read_prompts(Path(args.prompts))
    settings = SamplingConfig(args.guidance, args.rescale, args.steps, args.shift, args.seed)
    mesh = make_mesh(fsdp=1)
    origin, config, params = _trained(args.checkpoint, args.config, mesh)
    codec = config.latent_codec()
    with jax.set_mesh(mesh):
        pictures = sample(
            velocity_fn(config.model_config_for(codec)),
            params,
            prompts,
            encoders=FrozenEncoders(config.text_encoder(), codec, mesh),
            resolution=config.resolution,
            config=settings,
        )
    output = Path(args.output)
    with writing_to(output):
        for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            path = output / f"{number:04d}.png"
            text = {"prompt": prompt, "index": number} | origin | asdict(settings)
            _save(path, picture, text)
        draw_grid(pictures, prompts).save(output / "grid.png")
    for number, prompt in enumerate(prompts):
        print(f"{output / f'{number:04d}.png'}: {prompt}")
    print(f"grid of samples: {output / 'grid.png'}")
    return 0


def _trained(
    checkpoint: str, config_file: str | None, mesh: Mesh
) -> tuple[dict[str, object], TrainConfig, Params]:
    """Return what the weights are called, their configuration, and the weights, on all devices."""
    if config_file is not None:
        if Path(checkpoint).is_dir():
            raise EvenmixError(
                f"{checkpoint} is a run, which has its own configuration; leave out --config"
            )
        config = load_config(config_file)
        params = load_weights(checkpoint, config.model_config_for(config.latent_codec()))
        params = cut(params, shardings_of(place_state(mesh, params)))
        return {"weights": Path(checkpoint).name}, config, params
    if Path(checkpoint).is_file():
        raise EvenmixError(
            f"{checkpoint} is a file of weights; say by --config how a run with it is configured"
        )
    step, config, params = load_averaged(checkpoint, mesh)
    return {"step": step}, config, params


def _save(path: Path, picture: np.ndarray, text: dict[str, object]) -> None:
    """Write a PNG whose text chunks say how to draw it again."""
    metadata = PngImagePlugin.PngInfo()
    for name, value in text.items():
        metadata.add_itxt(name, str(value))
    Image.fromarray(picture).save(path, pnginfo=metadata)
