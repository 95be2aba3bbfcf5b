"""Problems that a random model solves (their references are its responses), and a student of it."""

import json
import shutil
from pathlib import Path

import torch

from dparallel.config.decoding import DecodingConfig
from dparallel.config.problems import ProblemsConfig, SourceConfig
from dparallel.decoding.generate import generate
from dparallel.models.checkpoints import load_model, load_tokenizer, save_model
from dparallel.problems.prompts import encode_problems, finish
from dparallel.problems.registry import load_problems


def dataset(path: Path) -> ProblemsConfig:
    """The problems of a file with the default column names."""
    return ProblemsConfig(benchmark="dataset", sources=(SourceConfig(path=str(path)),))


def own_answers(
    checkpoint: Path, path: Path, decoding: DecodingConfig, count: int, spoilt: int = 0, split: str = "test"
) -> ProblemsConfig:
    """Write `count` problems that the model answers; the first `spoilt` references are incorrect."""
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    coins = ProblemsConfig(benchmark="coins", split=split, count=3 * count)
    problems = load_problems(coins)
    generations = generate(
        model, encode_problems(problems, coins.protocol, tokenizer, model, decoding), decoding
    )
    with path.open("w", encoding="utf-8") as file:
        texts = [
            finish(generation.tokens, tokenizer, model.config.end_token_ids) for generation in generations
        ]
        answered = [pair for pair in zip(problems, texts, strict=True) if pair[1].strip()][:count]
        assert len(answered) == count
        for index, (problem, answer) in enumerate(answered):
            reference = "nothing like it" if index < spoilt else answer
            file.write(json.dumps({"prompt": problem.prompt, "reference": reference}) + "\n")
    return dataset(path)


def disturbed(checkpoint: Path, folder: Path, seed: int = 1) -> Path:
    """A checkpoint in `folder` whose weights differ slightly from those of the given one."""
    shutil.copytree(checkpoint, folder)
    model = load_model(checkpoint)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.01)
    save_model(model, folder)
    return folder
