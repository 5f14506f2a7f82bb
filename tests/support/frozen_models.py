"""Tiny networks of transformers with random weights, saved as folders: what a user would point a path at."""

import torch

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_random(kind, folder, **config):
    """Save a model of class `kind` with random weights, norms and embeddings included; the model, in eval mode."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind)
    model = model(model.config_class(**config)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.2 + (value.dim() == 1))
    model.save_pretrained(folder)
    return model
