"""One side of `llm_decode.py`: loads a language model, then writes texts. Started by `_common.Side`, not by hand.

argv[1] and each line of stdin are JSON objects (`Options`, `Request`); each answer is one line of stdout. Only
`ours` and `speed` import this project: the others may run under another Python, with other packages.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """What to load."""

    kind: str
    """a row of KINDS"""
    threads: int
    model: str = ""
    """folder of safetensors, or GGUF file"""
    quantization: str = "none"
    """of ours"""
    context: int = 2048


@dataclass(frozen=True)
class Request:
    """Greedy texts; no end token counts."""

    prompts: list[list[int]]
    tokens: int


@dataclass
class Answer:
    """What it came to."""

    ids: list[list[int]]
    ends: list[float]
    """clock at the end of every step that wrote a token; empty where the side does not tell"""
    seconds: float = 0.0
    gap_ms: float | None = None
    """mean milliseconds between a text's tokens, where only that is told"""


Run = Callable[[Request], Answer]


def load_ours(options: Options) -> tuple[Run, dict[str, Any]]:
    from multimodal_gen import LLM

    llm = LLM(
        options.model,
        dtype="bfloat16",
        quantization=options.quantization,
        threads=options.threads,
        prefix_cache=False,  # the rounds repeat their prompts
        max_context=options.context,
    )

    def run(request: Request) -> Answer:
        ends: list[float] = []

        def note(_delta: Any) -> None:  # the texts of one step come together
            now = time.perf_counter()
            if not ends or now - ends[-1] > 1e-3:
                ends.append(now)

        made = llm.generate(request.prompts, temperature=0.0, max_tokens=request.tokens, ignore_eos=True, on_delta=note)
        return Answer([list(each.token_ids) for each in made], ends)

    info = llm.info
    return run, {"dtype": info.dtype, "backend": info.backend, "weight_bytes": info.weight_bytes}


def load_transformers(options: Options, cache: str | None = None) -> tuple[Run, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()

    class Watch(StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []

        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.ends.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

    def run(request: Request) -> Answer:
        ids, watch = torch.tensor(request.prompts), Watch()
        config = GenerationConfig(
            max_new_tokens=request.tokens, min_new_tokens=request.tokens, do_sample=False, cache_implementation=cache,
            pad_token_id=0,
        )  # fmt: skip
        criteria = StoppingCriteriaList([watch])
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria)
        return Answer(made[:, ids.shape[1] :].tolist(), watch.ends)

    return run, {"dtype": "bfloat16", "attention": model.config._attn_implementation, "cache": cache or "dynamic"}


def load_transformers_static(options: Options) -> tuple[Run, dict[str, Any]]:
    return load_transformers(options, "static")


def load_openvino(options: Options) -> tuple[Run, dict[str, Any]]:
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.enable_prefix_caching = False
    pipe = openvino_genai.LLMPipeline(
        options.model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=options.threads
    )

    def run(request: Request) -> Answer:
        config = openvino_genai.GenerationConfig(max_new_tokens=request.tokens, ignore_eos=True, do_sample=False)
        config.apply_chat_template = False
        ids = np.asarray(request.prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        made = pipe.generate(inputs, config)
        lengths = [len(each) for each in made.tokens]
        assert lengths == [request.tokens] * len(request.prompts), lengths
        # Its mean is of all texts together.
        gap = made.perf_metrics.get_tpot().mean * len(request.prompts)
        return Answer([list(map(int, each)) for each in made.tokens], [], gap_ms=gap)

    return run, {"version": openvino_genai.__version__}


def load_vllm(options: Options) -> tuple[Run, dict[str, Any]]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{options.threads - 1}")
    import vllm

    llm = vllm.LLM(
        options.model, dtype="bfloat16", max_model_len=options.context, max_num_seqs=32, enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )  # fmt: skip
    engine = llm.llm_engine

    def run(request: Request) -> Answer:
        params = vllm.SamplingParams(temperature=0, max_tokens=request.tokens, ignore_eos=True, detokenize=False)
        for number, prompt in enumerate(request.prompts):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        ends, made = list[float](), dict[int, list[int]]()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if any(output.outputs and output.outputs[0].token_ids for output in outputs):
                ends.append(time.perf_counter())
            made.update((int(each.request_id), list(each.outputs[0].token_ids)) for each in outputs if each.finished)
        return Answer([made[number] for number in range(len(request.prompts))], ends)

    return run, {"version": vllm.__version__}


def load_speed(options: Options) -> tuple[Run, dict[str, Any]]:
    """What the machine does now: the bounds that the others are held against."""
    import torch

    from multimodal_gen.kernels.packed_linear import pack, packed_linear

    torch.set_num_threads(options.threads)
    numbers = torch.ones(64 << 20, dtype=torch.int64)  # 512 MB: more than any cache
    half = torch.ones(128 << 20, dtype=torch.float32)
    weight = pack(torch.ones(1024, 1024, dtype=torch.bfloat16))
    x = torch.ones(1024, 1024, dtype=torch.bfloat16)
    reads: dict[str, tuple[Callable[[], object], int]] = {
        "sum": (lambda: numbers.sum(), numbers.nbytes),
        "max": (lambda: half.amax(), half.nbytes),
        "dot": (lambda: torch.dot(half[: len(half) // 2], half[len(half) // 2 :]), half.nbytes),
    }

    def best(work: Callable[[], object], times: int) -> float:
        found = []
        for _ in range(times):
            begin = time.perf_counter()
            work()
            found.append(time.perf_counter() - begin)
        return min(found)

    def run(request: Request) -> Answer:
        read = max(size / best(work, 6) for work, size in reads.values())
        flops = 2 * 1024**3 / best(lambda: packed_linear(x, weight), 50)
        return Answer([], [read, flops])  # bytes and operations per second

    return run, {}


KINDS: dict[str, Callable[[Options], tuple[Run, dict[str, Any]]]] = {
    "ours": load_ours,
    "transformers": load_transformers,
    "transformers-static": load_transformers_static,
    "openvino": load_openvino,
    "vllm": load_vllm,
    "speed": load_speed,
}


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    options = Options(**json.loads(sys.argv[1]))
    run, facts = KINDS[options.kind](options)
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        request = Request(**json.loads(line))
        begin = time.perf_counter()
        answer = run(request)
        answer.seconds = time.perf_counter() - begin
        print(json.dumps(vars(answer)), file=answers, flush=True)


if __name__ == "__main__":
    main()
