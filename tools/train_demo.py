"""Trains the demo model of quantkit/demo from text that every CPython carries.

    python -m tools.train_demo --minutes 45 --out quantkit/demo/model

Run it at the root of the repository.  Needs torch, transformers and tokenizers; no network, no
GPU.  `--steps` fixes the schedule and so the result, up to the arithmetic of the machine;
`--minutes` fits the schedule to a time.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from quantkit_eval.figures.live import measure_accuracy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.demo import corpus, tasks

MAX_WEIGHT_BYTES = 8_000_000
VOCAB_SIZE = 2048
END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the trained weights, besides versions and hardware."""

    processes: int
    seed: int = 7
    tokens_per_step: int = 2048
    sequence_length: int = 128
    late_sequence_length: int = 512
    late_from: float = 0.75
    # Tasks first: what they need emerges much sooner without the English beside them.
    early_task_share: float = 0.9
    task_share: float = 0.4
    early_until: float = 0.35
    # A prompt's letters and digits are random: little can be learnt from predicting them.
    prompt_weight: float = 0.5
    answer_weight: float = 2.0
    matrix_learning_rate: float = 0.015
    other_learning_rate: float = 0.003
    weight_decay: float = 0.05
    warmup_steps: int = 60
    decay_from: float = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("quantkit/demo/model"))
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps; the same result every time")
    length.add_argument("--minutes", type=float, help="training time the schedule is fitted to")
    parser.add_argument("--snapshot-minutes", type=float, help="also write --out this often")
    parser.add_argument("--state", type=Path, help="file to go on from, written at every save")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Its threads would not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings = Settings(processes=arguments.processes)
    torch.manual_seed(settings.seed)

    english = [document.text for document in corpus.english_documents("train")]
    tokenizer = train_tokenizer(english, settings)
    model = LlamaForCausalLM(model_config(tokenizer)).share_memory()
    team = Team(model, settings.processes)
    schedule = Schedule(steps=arguments.steps, minutes=arguments.minutes)

    def work(rank: int) -> None:
        run = Run(model, tokenizer, english, settings, team, rank, arguments.state)
        run.train(schedule, arguments.snapshot_minutes, arguments.out)
        if rank == 0:
            run.save(arguments.out, examples_per_task=500)

    context = multiprocessing.get_context("fork")
    others = [context.Process(target=work, args=(rank,), daemon=True) for rank in team.ranks[1:]]
    for process in others:
        process.start()
    work(0)
    for process in others:
        process.join()


def train_tokenizer(english: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE with each digit its own token, so that numbers are spelled one way."""
    rng = random.Random(settings.seed)
    texts = english + [tasks.task_text("train", rng) for _ in range(1000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.03,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train: exactly one of the two is given."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, seconds: float) -> float:
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return seconds / (60 * self.minutes)


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What the runs before this one did, when it goes on from a state file."""

    runs: int = 0
    steps: int = 0
    seconds: float = 0.0


class Team:
    """What the processes share: the weights, each one's gradients, the progress, a barrier.

    Each process updates the weights it owns, in place, with the mean of all gradients.
    """

    def __init__(self, model: LlamaForCausalLM, processes: int) -> None:
        self.ranks = list(range(processes))
        self.progress = shared(torch.zeros(1, dtype=torch.float64))
        self.barrier = multiprocessing.get_context("fork").Barrier(processes)
        self.gradients = [
            [shared(torch.zeros_like(p)) for p in model.parameters()] for _ in self.ranks
        ]


def shared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, moved to memory that forked processes share."""
    return tensor.share_memory_()  # type: ignore[no-untyped-call,no-any-return]


class Muon:
    """Momentum orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024, Muon).

    https://kellerjordan.github.io/posts/muon/.  In float32, matrices of one shape batched.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], weight_decay: float) -> None:
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self._groups = [
            (group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()
        ]
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float, momentum: float = 0.95) -> None:
        for group, velocity in self._groups:
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            velocity.lerp_(gradient, 1 - momentum)
            update = orthogonalised(gradient.lerp_(velocity, momentum))
            rows, columns = update.shape[-2:]
            size = learning_rate * math.sqrt(max(1.0, rows / columns))
            for parameter, direction in zip(group, update, strict=True):
                parameter.mul_(1 - learning_rate * self._weight_decay)
                parameter.add_(direction, alpha=-size)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values land in about 0.7..1.2."""
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = x.mT if matrix.shape[-2] > matrix.shape[-1] else x
    return result


class Run:
    """One process of a training run: its optimizers, its token stream and the record of it."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        english: list[str],
        settings: Settings,
        team: Team,
        rank: int,
        state: Path | None,
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._team, self._rank = team, rank
        self._tokens = self._token_stream(english)
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, team.gradients[rank], strict=True):
            parameter.grad = gradient
        layer_of = {
            id(p): index
            for index, layer in enumerate(model.model.layers)
            for p in layer.parameters()
            if p.ndim == 2
        }
        last = len(team.ranks) - 1
        self._owned = [
            index
            for index, p in enumerate(parameters)
            if layer_of.get(id(p), last) % len(team.ranks) == rank
        ]
        owned = [parameters[index] for index in self._owned]
        matrices = [p for p in owned if id(p) in layer_of]
        others = [p for p in owned if id(p) not in layer_of]
        self._muon = Muon(matrices, settings.weight_decay)
        self._adam = (
            torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
            if others
            else None
        )
        self._step = 0
        self._seconds = 0.0
        self._loss = float("nan")
        self._state = state
        self._earlier = Earlier()
        if state is not None and state.exists():
            saved = torch.load(state, weights_only=True)
            self._earlier = Earlier(**saved["earlier"])
            if rank == 0:
                model.load_state_dict(saved["weights"])

    def train(self, schedule: Schedule, snapshot_minutes: float | None, out: Path) -> None:
        started = time.monotonic()
        snapshots = 1
        while True:
            if self._rank == 0:
                self._seconds = time.monotonic() - started
                self._team.progress[0] = schedule.progress(self._step, self._seconds)
            self._team.barrier.wait()
            progress = self._team.progress.item()
            if progress >= 1.0:
                return
            self._one_step(progress)
            if self._rank != 0:
                continue
            if self._step % 20 == 0:
                rate = self._step * self._settings.tokens_per_step / self._seconds
                print(
                    f"step {self._step} progress {progress:.3f} loss {self._loss:.3f} "
                    f"{rate:.0f} tokens/s",
                    flush=True,
                )
            if self._step % 200 == 0:
                print(self._task_accuracies(60), flush=True)
            if snapshot_minutes and self._seconds > 60 * snapshot_minutes * snapshots:
                snapshots += 1
                self.save(out, examples_per_task=50)

    def _one_step(self, progress: float) -> None:
        settings, team = self._settings, self._team
        late = progress >= settings.late_from
        length = settings.late_sequence_length if late else settings.sequence_length
        rows = settings.tokens_per_step // len(team.ranks) // length
        drawn = [next(self._tokens) for _ in range(rows * length)]
        ids_NT = torch.tensor([token for token, _ in drawn]).view(rows, length)
        weights_NT = torch.tensor([weight for _, weight in drawn]).view(rows, length)
        for gradient in team.gradients[self._rank]:
            gradient.zero_()
        logits_NTV = self._model(input_ids=ids_NT, use_cache=False).logits[:, :-1]
        losses = functional.cross_entropy(
            logits_NTV.flatten(0, 1), ids_NT[:, 1:].flatten(), reduction="none"
        )
        weights = weights_NT[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        torch.autograd.backward(loss)
        team.barrier.wait()
        for index in self._owned:
            mean = torch.stack([gradients[index] for gradients in team.gradients]).mean(0)
            team.gradients[self._rank][index].copy_(mean)
        warm = min(1.0, (self._step + 1) / settings.warmup_steps)
        cool = min(1.0, max(0.0, 1.0 - progress) / (1.0 - settings.decay_from))
        if self._adam is not None:
            self._adam.param_groups[0]["lr"] = settings.other_learning_rate * warm * cool
            self._adam.step()
        self._muon.step(settings.matrix_learning_rate * warm * cool)
        self._step += 1
        if self._step == 1:
            self._loss = loss.item()
        self._loss += 0.05 * (loss.item() - self._loss)
        team.barrier.wait()

    def _token_stream(self, english: list[str]) -> Iterator[tuple[int, float]]:
        """Endless tokens and their weights in the loss: pieces of English and of tasks."""
        settings = self._settings
        # As long as the longer rows of the end, so that those have something far back to recall.
        piece = settings.late_sequence_length
        rng = random.Random(f"{settings.seed}/{self._rank}")
        encoded = [self._tokenizer(text, verbose=False)["input_ids"] for text in english]
        prose: list[int] = []
        while True:
            early = self._team.progress.item() < settings.early_until
            if rng.random() < (settings.early_task_share if early else settings.task_share):
                questions: list[tuple[int, float]] = []
                while len(questions) < piece:
                    questions += self._task_tokens(rng)
                yield from questions[:piece]
            else:
                if len(prose) < piece:
                    rng.shuffle(encoded)
                    prose = [token for document in encoded for token in document]
                yield from ((token, 1.0) for token in prose[:piece])
                prose = prose[piece:]

    def _task_tokens(self, rng: random.Random) -> list[tuple[int, float]]:
        settings = self._settings
        drawn = tasks.task_examples("train", rng)
        texts = [text for example in drawn for text in (example.prompt, f"{example.answer}\n")]
        tokens: list[tuple[int, float]] = [(self._tokenizer.bos_token_id, 1.0)]
        encoded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        for index, ids in enumerate(encoded):
            weight = settings.answer_weight if index % 2 else settings.prompt_weight
            tokens += [(token, weight) for token in ids]
        return tokens

    def _task_accuracies(self, count: int) -> dict[str, float]:
        self._model.eval()
        found = {
            task: measure_accuracy(
                self._model, self._tokenizer, tasks.examples(task, "heldout", count, seed=1)
            )
            for task in tasks.TASKS
        }
        self._model.train()
        return found

    def save(self, out: Path, examples_per_task: int) -> None:
        """Writes the checkpoint in bfloat16 and training.json, measured on what was written."""
        before = self._earlier
        total = Earlier(
            runs=before.runs + 1,
            steps=before.steps + self._step,
            seconds=before.seconds + self._seconds,
        )
        if self._state is not None:
            saved = {"weights": self._model.state_dict(), "earlier": asdict(total)}
            torch.save(saved, self._state)
        temporary = out.with_name(out.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        rounded = LlamaForCausalLM(self._model.config)
        rounded.load_state_dict(self._model.state_dict())
        rounded.to(torch.bfloat16).save_pretrained(temporary)
        self._tokenizer.save_pretrained(temporary)
        weights = temporary / "model.safetensors"
        if weights.stat().st_size > MAX_WEIGHT_BYTES:
            raise SystemExit(f"{weights.stat().st_size} bytes of weights; at most 8,000,000")
        kept, self._model = self._model, rounded.float()
        record = {
            "parameters": sum(p.numel() for p in rounded.parameters()),
            "weight_bytes": weights.stat().st_size,
            "runs": total.runs,
            "steps": total.steps,
            "tokens": total.steps * self._settings.tokens_per_step,
            "training_seconds": round(total.seconds),
            "training_loss": round(self._loss, 4),
            "heldout_perplexity": round(heldout_perplexity(rounded, self._tokenizer), 4),
            "heldout_task_accuracy": self._task_accuracies(examples_per_task),
            "settings": asdict(self._settings),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }
        self._model = kept
        (temporary / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record), flush=True)
        for path in temporary.iterdir():
            path.chmod(0o644)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)


@torch.no_grad()
def heldout_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """exp of the mean loss per token over the held-out English in rows of 512 tokens."""
    flat: list[int] = []
    for document in corpus.english_documents("heldout"):
        flat += tokenizer(document.text, verbose=False)["input_ids"]
    rows = torch.tensor(flat[: len(flat) // 512 * 512]).view(-1, 512)
    total = 0.0
    for batch in torch.split(rows, 8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        total += loss.item() * len(batch)
    return math.exp(total / len(rows))


if __name__ == "__main__":
    main()
