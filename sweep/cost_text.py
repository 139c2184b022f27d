"""A cost file as TOML text, as sweep.configs.load_costs() reads it."""

from kernels.cost import Cost
from sweep.configs import COST_TEXTS, CostFile
from sweep.files import toml_value


def cost_toml(file: CostFile) -> str:
    """The file's [about] and every cost, in the order of kernels.cost.Cost; values and ranges in ns."""
    lines = ["[about]", *(f"{key} = {toml_value(text)}" for key, text in file.about.items())]
    for cost in Cost:
        low, high = file.ranges[cost]
        lines += ["", f"[cost.{cost.name.lower()}]", f"value = {file.values[cost]}", f"range = [{low}, {high}]"]
        texts = file.texts.get(cost, {})
        lines += [f"{key} = {toml_value(texts[key])}" for key in COST_TEXTS if key in texts]
    return "\n".join(lines) + "\n"
