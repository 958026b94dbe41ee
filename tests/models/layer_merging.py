"""The methods that merge inside the encoder, as the tests vary them, with their references."""

from __future__ import annotations

from dataclasses import replace

from tests.reference import merging as reference
from vtkernels import zoo

METHODS = [method.name for method in zoo.methods() if method.merges and "vision_layers" in method.stages]

# Every rule, with what it does to one layer of a tower of L layers and whether it weighs keys by size.
CASES = {
    "tome": {},
    "tome-unweighted": {"proportional_attention": False},
    "tome-own-order": {"order": "method"},
    "pitome": {},
    "pitome-weighted": {"proportional_attention": True},
    "pitome-bsm": {"energy_bsm": True, "margin": 0.75, "order": "method"},
    "pitome-llava": {"released_llava": True},
    "pitome-own-order": {"order": "method", "alpha": 0.5},
    "tinychart": {},
    "auroracap": {},
    "simvlg": {},
}


def rule(case: str, num_layers: int, prefix: int):
    """The reference of a case: ``merge(layer, tokens, metric, r)``, whether keys are weighed, if after the MLP."""
    method, options = case.split("-")[0], CASES[case]
    llava = options.get("released_llava", False)

    def merge(layer, tokens, metric, r):
        if method != "pitome" or (llava and layer < round(13 * num_layers / 24)):
            return reference.tome(tokens, metric, r, prefix, weighted=method != "simvlg" and not llava)
        margin = options.get("margin", 0.9) * (1 - layer / num_layers)
        bsm = options.get("energy_bsm", False) and layer < -(-num_layers // 2)
        tokens = reference.pitome(tokens, metric, r, prefix, margin, bsm, options.get("alpha", 1.0))
        return [replace(token, size=1.0) for token in tokens] if llava else tokens

    weighs = options.get("proportional_attention", method not in ("pitome", "simvlg"))
    return merge, weighs, llava


def expected(case: str, layers, x, schedule: list[int], num_layers: int, prefix: int):
    """The reference's tokens of one image, in the order that the case asks for."""
    merge, weighs, after_mlp = rule(case, num_layers, prefix)
    tokens = reference.run(layers, x, schedule, merge, weighs_keys=weighs, after_mlp=after_mlp)
    return tokens if CASES[case].get("order") == "method" else reference.by_first_patch(tokens)


def trace(model):
    """Every attribute of every submodule, containers by content."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }
