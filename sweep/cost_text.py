"""A cost file as TOML text, as sweep.configs.load_costs() reads it."""

import json

from kernels.cost import Cost
from sweep.configs import COST_TEXTS, CostFile


def toml_text(text: str) -> str:
    """A TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def cost_toml(file: CostFile) -> str:
    """The file's [about] and every cost, in the order of kernels.cost.Cost; values and ranges in ns."""
    lines = ["[about]", *(f"{key} = {toml_text(text)}" for key, text in file.about.items())]
    for cost in Cost:
        low, high = file.ranges[cost]
        lines += ["", f"[cost.{cost.name.lower()}]", f"value = {file.values[cost]}", f"range = [{low}, {high}]"]
        texts = file.texts.get(cost, {})
        lines += [f"{key} = {toml_text(texts[key])}" for key in COST_TEXTS if key in texts]
    return "\n".join(lines) + "\n"
