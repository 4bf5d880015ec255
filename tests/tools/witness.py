"""Print what Hugging Face's transformers computes with the toy: the numbers in tests/test_model.py.

    .venv/bin/pip install torch transformers safetensors
    .venv/bin/python tests/tools/witness.py

The weights are read with TensorFlow, and renamed for transformers. No code of gpt2.py takes part.
"""

import json
import os
import pathlib
import re

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
import torch
import transformers

TOY = pathlib.Path(__file__).resolve().parents[1] / "toy/124M"


def torch_name(name):
    """The name of a variable in transformers: model/h0/ln_1/g -> h.0.ln_1.weight."""
    name = re.sub(r"^model/(h(?=\d))?", lambda match: "h." if match[1] else "", name)
    name = re.sub("/[gw]$", "/weight", re.sub("/b$", "/bias", name)).replace("/", ".")
    return name + ".weight" * name.startswith("w")  # wte, wpe


def load():
    hparams = json.loads((TOY / "hparams.json").read_text())
    shape = {key: hparams["n_" + key[2:]] for key in ("n_embd", "n_layer", "n_head")}
    config = transformers.GPT2Config(
        vocab_size=hparams["n_vocab"], n_positions=hparams["n_ctx"], eos_token_id=None, **shape
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    state = model.transformer.state_dict()
    for name, _shape in tf.train.list_variables(str(TOY / "model.ckpt")):
        value = torch.from_numpy(tf.train.load_variable(str(TOY / "model.ckpt"), name))
        state[torch_name(name)].copy_(value.reshape(state[torch_name(name)].shape))
    return model


def main():
    model = load()
    vocabulary = json.loads((TOY / "encoder.json").read_text("utf-8"))
    # the text is a list of ids, so that no tokenizer takes part: 0, 7, 14, ... (a long one)
    ids = [i * 7 % len(vocabulary) for i in range(200)]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        for position in (0, 99, 199):
            print(position, [round(value, 4) for value in logits[position, ::64].tolist()])
        start = torch.tensor([[vocabulary["<|endoftext|>"]]])
        new = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=40, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    print(new[0, 1:].tolist())


if __name__ == "__main__":
    main()
