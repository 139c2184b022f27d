"""A figure as a line of text."""

from tests.bench.figures import Figure


def cell(value: float, unit: str) -> str:
    number = f"{value:.2e}" if value >= 1e5 else f"{value:.4f}" if value < 0.05 else f"{value:.2f}"
    return f"{number} {unit}"


def line(figure: Figure) -> str:
    sign = ">=" if figure.more_is_better else "<="
    asked, measured = f"{sign} {cell(figure.asked, figure.unit)}", cell(figure.measured, figure.unit)
    return f"{figure.name:52} {asked:22} {measured:20} {'met' if figure.met else 'NOT MET'}"
