"""`mmgen doctor`: what this machine can do, and whether the chosen model fits it."""

from __future__ import annotations

from typing import Any

import msgspec

from multimodal_gen.cli import text_models
from multimodal_gen.cli.flags import Arguments, Parser, add_settings, read_settings
from multimodal_gen.cli.text import as_json, columns
from multimodal_gen.config import NO_MODEL, EngineConfig
from multimodal_gen.errors import MmgenError
from multimodal_gen.units import size


def add_arguments(parser: Parser) -> None:
    """Flags of `mmgen doctor`."""
    parser.usage = "mmgen doctor [flags]"
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--gpu", metavar="GPU", help="plan for this GPU instead: a size (24GB) or a name (rtx-4090)")
    add_settings(parser, EngineConfig)


def run(arguments: Arguments) -> int:
    """Print the report; the exit code is 1 when something would keep the model from running."""
    from multimodal_gen.memory.gpus import find_gpu

    config = read_settings(arguments, EngineConfig)
    if arguments.gpu is not None:
        find_gpu(arguments.gpu)  # a name that is not known is told at once
    report = examine(config, arguments.gpu)
    print(as_json(report) if arguments.json else _text(report))
    return 1 if report["problems"] else 0


def examine(config: EngineConfig, gpu: str | None = None) -> dict[str, Any]:
    """All facts as plain data; `problems` lists what would keep the model from running with these settings."""
    from multimodal_gen.cli import hardware

    report: dict[str, Any] = {
        "versions": hardware.versions(),
        "cpu": hardware.cpu(),
        "devices": hardware.devices(),
        "memory": hardware.memory(),
        "problems": [],
    }
    try:
        report["settings"] = hardware.chosen(config)
        if config.model_path != NO_MODEL:
            _add_model(config, gpu, report)
        if config.llm_path is not None:
            text_models.fit(config, report)
    except MmgenError as error:
        report["problems"].append(error.message)
    return report


def _add_model(config: EngineConfig, gpu: str | None, report: dict[str, Any]) -> None:
    """The model, and where it would be: a plan, or for families that diffusers computes, an estimate."""
    from multimodal_gen.cli.fit import fit
    from multimodal_gen.cli.models import card_facts
    from multimodal_gen.pipelines import registry

    # A report must not start a download of many gigabytes.
    config = msgspec.structs.replace(config, local_files_only=True)
    card = registry.describe(config)
    facts = card_facts(card)
    named = {name: facts[name] for name in ("name", "family", "pipeline_class")}
    model = report["model"] = {**named, **facts["weights"], "fits": False}
    if card.family == registry.fallback().family:
        _estimate(model, gpu, report)
        return
    report["plan"] = fit(card, config, gpu)
    model["fits"] = True


def _estimate(model: dict[str, Any], gpu: str | None, report: dict[str, Any]) -> None:
    from multimodal_gen.cli import hardware
    from multimodal_gen.memory.free import free_bytes
    from multimodal_gen.memory.gpus import find_gpu

    chosen = report["settings"]
    place, free = chosen["device"], free_bytes(chosen["device"])
    if gpu is not None:
        place, _, free = find_gpu(gpu)
    needed = hardware.estimate(model["parameters"], chosen["dtype"])
    model |= {"needed_bytes": needed, "free_bytes": free, "fits": needed <= free}
    if needed > free:
        report["problems"].append(
            f"{model['name']} needs about {size(needed)} on {place} and {size(free)} are free. Close other programs, "
            "or choose a smaller model or a --dtype of two bytes."
        )


def _text(report: dict[str, Any]) -> str:
    cpu, memory = report["cpu"], report["memory"]
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("cpu", f"{cpu['model']}: {cpu['physical_cores']} cores, {cpu['logical_cores']} threads"),
        ("instructions", f"{cpu['capability']} ({', '.join(cpu['instructions']) or 'nothing special'})"),
        ("threads", f"torch takes {cpu['torch_threads']} by itself; --threads sets another number"),
        ("memory", f"{size(memory['free_bytes'])} free of {size(memory['total_bytes'])}"),
    ]
    for device in report["devices"]:
        free = "" if device["total_bytes"] is None else f", {size(device['free_bytes'])} free"
        rows.append(
            (device["device"], f"{device['name']}: computes {', '.join(device['native_dtypes'])} natively{free}")
        )
    if "settings" in report:
        rows += _settings_rows(report["settings"])
    if "model" in report:
        rows += _model_rows(report["model"], report["settings"]["dtype"])
    if "plan" in report:
        rows += _plan_rows(report["plan"])
    if "text_model" in report:
        rows += text_models.rows(report["text_model"])
    lines = [columns(rows), "", *(f"problem: {problem}" for problem in report["problems"])]
    return "\n".join(lines if report["problems"] else [*lines, "No problems found."])


def _settings_rows(chosen: dict[str, Any]) -> list[tuple[str, str]]:
    backends = ", ".join(name + (f" (no: {why})" if why else "") for name, why in chosen["attention_backends"].items())
    return [
        ("would use", f"{chosen['dtype']} on {chosen['device']}, attention by {chosen['attention_backend']}"),
        ("dtype auto", f"is {chosen['dtype_auto']} on {chosen['device']}"),
        ("attention", backends),
        ("kernels", chosen["kernels"]),
    ]


def _model_rows(model: dict[str, Any], dtype: str) -> list[tuple[str, str]]:
    stored = f"{size(model['bytes'])} of {', '.join(model['dtypes'])} on disk"
    rows = [
        ("model", f"{model['name']} ({model['family']}, {model['pipeline_class']})"),
        ("weights", f"{model['parameters']:,} parameters, {stored}"),
    ]
    if "needed_bytes" in model:
        verdict = "fits" if model["fits"] else "does NOT fit"
        rows.append(("as " + dtype, f"about {size(model['needed_bytes'])} with working memory: {verdict}"))
    return rows


def _plan_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    each = f", on each of {plan['ranks']} ranks" if plan["ranks"] > 1 else ""
    first = f"{plan['dtype']} on {plan['place']}{each}:"
    note = [] if plan["warning"] is None else [("note", plan["warning"])]
    return [("plan", first), *(("", line) for line in plan["lines"]), *note]
