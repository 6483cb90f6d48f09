"""Pictures of what was measured, where matplotlib is installed."""
from pathlib import Path

from study.measure import say


def load_pyplot():
    """The library's module that draws into files. None, and a line on stderr: it is not there."""
    try:
        import matplotlib
    except ImportError:
        say("no pictures: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_batches(rows, prefix):
    """Tokens/s and peak memory against the batch, a PNG a model and load, named after `prefix`."""
    pyplot = load_pyplot()
    if not pyplot:
        return
    loads = [(row["model"], row["prompt"], row["output"]) for row in rows]
    for load in dict.fromkeys(loads):
        figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for cache in dict.fromkeys(row["cache"] for row in rows):
            curve = [row for row, of in zip(rows, loads) if of == load and row["cache"] == cache]
            curve.sort(key=lambda row: row["batch"])
            batches = [row["batch"] for row in curve]
            peaks = [row.get("peak_bytes", row["formula_bytes"]) / 1e9 for row in curve]
            speed.plot(batches, [row["tokens_per_s"] for row in curve], marker="o", label=cache)
            memory.plot(batches, peaks, marker="o", label=cache)
        speed.set(xlabel="batch", ylabel="tokens/s, prefill included", ylim=(0, None))
        memory.set(xlabel="batch", ylabel="peak memory, GB", ylim=(0, None))
        speed.legend()
        model, prompt, output = load
        figure.suptitle(f"{model}, {prompt} prompt and {output} new tokens")
        figure.savefig(f"{prefix}-{model}-{prompt}.png", dpi=120)
        pyplot.close(figure)


def draw_quality(rows, folder):
    """The stored bits against KL, as quality-bits.png in `folder`."""
    pyplot = load_pyplot()
    if not pyplot:
        return
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for row in rows[1:]:
        place = row["bits"], row["kl"]
        axis.plot(*place, "o", color="tab:blue" if row["simulated"] else "tab:red")
        axis.annotate(row["cache"], place, fontsize=6, xytext=(4, 2), textcoords="offset points")
    axis.set(xlabel="stored bits per element", ylabel="mean KL to full precision", yscale="log")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "quality-bits.png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)
