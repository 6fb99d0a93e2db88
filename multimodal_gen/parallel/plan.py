"""From settings and a model's card to the ranks that run it, or to an error that names both numbers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from multimodal_gen.attention.registry import GIVE_LSE
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.request import ModelCard
from multimodal_gen.text import TextCard


@dataclass(frozen=True)
class Plan:
    """Replicas, and how each of them is shared out."""

    dp: int  # replicas that know nothing of one another
    degrees: Degrees

    @property
    def workers(self) -> int:
        """Processes of all replicas."""
        return self.dp * self.degrees.world


def plan(
    config: EngineConfig, card: ModelCard | None, cuda_devices: int | None = None, *, text: TextCard | None = None
) -> Plan:
    """Settle what the settings leave open and check all of it.

    Without --num-gpus the ranks are the product of the sizes. With it, ranks that no size claims share the sequence: by
    Ulysses, which sends the least, as far as the heads can be shared out, and by ring beyond that.

    A language model beside pictures is shared out as they are: over the ranks of --tp-size where its heads divide, and
    else whole on every rank. Alone, it is shared out by --tp-size only.

    Args:
        cuda_devices: visible CUDA devices, where the caller knows; None leaves that check to the workers.

    Raises: ConfigError naming both numbers.
    """
    if card is None:
        assert text is not None, "an engine hosts something"
        return _plan_text(config, text, cuda_devices)
    degrees = _fill(config, card)
    made = Plan(config.dp_size, degrees)
    _check_model(card, degrees)
    _check_heads(card, degrees)
    _check_ring(config, degrees)
    _check_devices(config, made, cuda_devices)
    return made


def _plan_text(config: EngineConfig, text: TextCard, cuda_devices: int | None) -> Plan:
    """Of a language model alone: all ranks of a replica share every layer."""
    for name, size in (("ulysses_degree", config.ulysses_degree), ("ring_degree", config.ring_degree)):
        if (size or 1) > 1:
            raise ConfigError(f"{_flag(name)} {size} shares out pictures, and none are made here.", param=name)
    if config.enable_cfg_parallel:
        raise ConfigError(
            "--enable-cfg-parallel shares out pictures, and none are made here.", param="enable_cfg_parallel"
        )
    tp = config.tp_size
    if config.num_gpus is not None:
        share, odd = divmod(config.num_gpus, config.dp_size)
        if odd or (share != tp and tp > 1):
            raise ConfigError(
                f"--num-gpus {config.num_gpus} is not what the sizes come to: dp {config.dp_size} x tp {tp}.",
                param="num_gpus",
            )
        tp = share
    if text.heads % tp:
        raise ConfigError(
            f"The {text.heads} attention heads of {text.name} cannot be shared out over {tp} ranks; their number must "
            f"divide {text.heads}. Use --dp-size for several replicas.",
            param="tp_size",
        )
    made = Plan(config.dp_size, Degrees(tp=tp))
    _check_devices(config, made, cuda_devices)
    return made


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fill(config: EngineConfig, card: ModelCard) -> Degrees:
    cfg = 2 if config.enable_cfg_parallel else 1
    ulysses, ring = config.ulysses_degree, config.ring_degree
    claimed = config.dp_size * cfg * config.tp_size * (ulysses or 1) * (ring or 1)
    total = claimed if config.num_gpus is None else config.num_gpus
    rest, odd = divmod(total, claimed)
    if odd or (rest > 1 and ulysses is not None and ring is not None):
        multiple = "a multiple of " if ulysses is None or ring is None else ""
        raise ConfigError(
            f"--num-gpus {total} is not what the sizes come to: dp {config.dp_size} x cfg {cfg} x tp {config.tp_size} "
            f"x ulysses {ulysses or 'any'} x ring {ring or 'any'} needs {multiple}{claimed}.",
            param="num_gpus",
        )
    if ulysses is None and ring is None:
        shares = (u for u in range(rest, 1, -1) if rest % u == 0 and card.heads % (config.tp_size * u) == 0)
        ulysses = next(shares, 1)
        ring = rest // ulysses
    return Degrees(tp=config.tp_size, ulysses=ulysses or rest, ring=ring or rest, cfg=cfg)


def _check_model(card: ModelCard, degrees: Degrees) -> None:
    if degrees.world > 1 and not card.heads:
        raise ConfigError(
            f"{card.name} runs on 1 rank per replica, and {degrees.world} were asked for ({degrees}): its family "
            f"({card.family}) cannot be shared out. Use --dp-size for several replicas.",
            param="num_gpus",
        )
    guided = "guidance_scale" in card.parameters and card.guidance_threshold != float("inf")
    if degrees.cfg > 1 and not guided:
        raise ConfigError(
            f"--enable-cfg-parallel wants 2 groups of ranks, and {card.name} takes no guidance: it has 1 branch.",
            param="enable_cfg_parallel",
        )


def _check_heads(card: ModelCard, degrees: Degrees) -> None:
    shares = degrees.tp * degrees.ulysses
    if card.heads % shares:
        raise ConfigError(
            f"The {card.heads} attention heads of {card.name} cannot be shared out over tp {degrees.tp} x ulysses "
            f"{degrees.ulysses} = {shares} ranks; the product must divide {card.heads}. Ring needs no heads.",
            param="tp_size" if card.heads % degrees.tp else "ulysses_degree",
        )


def _check_ring(config: EngineConfig, degrees: Degrees) -> None:
    if degrees.ring > 1 and config.attention_backend not in ("auto", *GIVE_LSE):
        raise ConfigError(
            f"--ring-degree {degrees.ring} needs an attention backend that tells its log-sum-exp, and "
            f"{config.attention_backend} is none; use auto, {', '.join(GIVE_LSE[:-1])} or {GIVE_LSE[-1]}, "
            "or --ring-degree 1.",
            param="attention_backend",
        )


def _check_devices(config: EngineConfig, made: Plan, cuda_devices: int | None) -> None:
    if config.device.startswith("cuda:") and made.workers > 1:
        raise ConfigError(
            f"--device {config.device} names 1 device, and {made.workers} ranks need one each; use --device cuda.",
            param="device",
        )
    on_cuda = config.device == "cuda" or (config.device == "auto" and bool(cuda_devices))
    if on_cuda and cuda_devices is not None and cuda_devices < made.workers:
        raise ConfigError(
            f"{made.workers} ranks need a CUDA device each, and {cuda_devices} are visible.", param="num_gpus"
        )
