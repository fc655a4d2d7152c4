"""The tables of docs/cost.md."""

from typing import Any

from benchmarks.machine import where


def cost_model_table(result: dict[str, Any]) -> str:
    """Modelled against measured time and memory of a step, by resolution, batch, width and processes."""
    rates = result["rates"]
    lines = [
        f"`{result['base']}`, on crops of 64 px, batch 4, width 32 where nothing else is said; {where(result)}. "
        f"Fitted: A {rates['gflops']:.0f} GFLOP/s, B {rates['activations_gb_per_s']:.2f} GB/s, "
        f"C {rates['weights_gb_per_s']:.2f} GB/s, and {rates['memory_of_process_mb']:.0f} MB that a process takes for "
        "itself.",
        "",
        "| | measured (s) | modelled (s) | error | measured (MB) | modelled (MB) | error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["points"].items():
        late = row["modelled_s"] / row["measured_s"] - 1
        memory = row["computed_mb"] + rates["memory_of_process_mb"]
        lines.append(
            f"| {name} | {row['measured_s']:.2f} | {row['modelled_s']:.2f} | {late:+.0%} | {row['measured_mb']:,.0f} "
            f"| {memory:,.0f} | {memory / row['measured_mb'] - 1:+.0%} |"
        )
    for count, row in result["processes"].items():
        name = f"processes {count}, batch {result['process_batch']}"
        late = row["modelled_s"] / row["measured_s"] - 1
        lines.append(f"| {name} | {row['measured_s']:.2f} | {row['modelled_s']:.2f} | {late:+.0%} | | | |")
    return "\n".join(lines)


def cost_gpus_table(result: dict[str, Any]) -> str:
    """What the cost model says of many GPUs."""
    lines = [
        f"`{result['recipe']}` on {result['gpu'].upper()}s, computed and not measured: {result['utilisation']:.0%} of "
        f"the peak, {result['nvlink'] / 1e9:.0f} GB/s within a machine of {result['node']} GPUs and "
        f"{result['network'] / 1e9:.0f} GB/s between machines for each GPU, checkpoints written at "
        f"{result['disk'] / 1e9:.0f} GB/s, {result['loader_per_core']:.0f} images/s for each core of the loader; "
        f"`{result['command']}`.",
        "",
        "| GPUs | batch, images per GPU | compute (ms) | sum of gradients (ms), not hidden | checkpoints (ms) "
        "| images/s | loader cores per GPU |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for count, row in result["rows"].items():
        lines.append(
            f"| {int(count):,} | {row['batch']:,}, {row['images_per_gpu']} | {row['compute_ms']:.0f} "
            f"| {row['all_reduce_ms']:.1f}, {row['waiting_ms']:.1f} | {row['checkpoint_ms']:.1f} "
            f"| {row['images_per_second']:,.0f} | {row['loader_cores_per_gpu']:.2f} |"
        )
    return "\n".join(lines)


MAKERS = {
    "cost-model": cost_model_table,
    "cost-gpus": cost_gpus_table,
}
"""By the beginning of a result's name, the longer one first."""
