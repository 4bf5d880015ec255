"""Draw the README's picture of attention: `python tests/tools/draw_attention.py [FILE.png]`.

Runs the toy model on one line of its poem, and shows the attention weights of the four heads of
layer 1. (Layers and heads are counted from 0, as in the code.) Needs Matplotlib.
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOY = ROOT / "tests/toy"
sys.path.insert(0, str(ROOT))

import gpt2
from utils import load_encoder_hparams_and_params

TEXT = "One, two! One, two! And through and through"
LAYER = 1


def attention_weights(ids, params, n_head):
    """The results of softmax, an array [n_head, n_seq, n_seq] for each layer."""
    softmax = gpt2.softmax
    weights = []

    def recorded_softmax(scores):
        weights.append(softmax(scores))
        return weights[-1]

    gpt2.softmax = recorded_softmax
    gpt2.gpt2(ids, **params, n_head=n_head)
    gpt2.softmax = softmax
    return weights


def draw(weights, tokens, file):
    plt.rcParams["font.size"] = 13
    plt.rcParams["font.family"] = "monospace"
    colors = plt.get_cmap("Blues").with_extremes(bad="lightgrey")  # bad: masked
    later = ~np.tri(len(tokens), dtype=bool)
    figure, axes = plt.subplots(2, 2, figsize=(11, 10), layout="constrained")
    for head, axis in enumerate(axes.flat):
        image = axis.imshow(np.ma.array(weights[head], mask=later), cmap=colors, vmin=0, vmax=1)
        axis.set_title(f"layer {LAYER}, head {head}")
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(len(tokens)), tokens, **turned)
        axis.set_yticks(range(len(tokens)), tokens)
    figure.supxlabel("keys: the tokens that are looked at (grey: later ones, hidden by the mask)")
    figure.supylabel("queries: the tokens that look")
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.4)
    figure.savefig(file, dpi=80)


def main(file=TOY / "attention.png"):
    encoder, hparams, params = load_encoder_hparams_and_params("124M", TOY)
    ids = encoder.encode(TEXT)
    weights = attention_weights(ids, params, hparams["n_head"])
    draw(weights[LAYER], [f'"{encoder.decode([i])}"' for i in ids], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
