"""A merged model as MLflow loads it: `mlflow.pyfunc.load_model("models:/NAME@champion")`.

MLflow keeps a copy of this file beside the model's files and runs it; dparallel must be installed there.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

import dparallel

CHECKPOINT = "checkpoint"  # name of the artifact with the model's files
DECODING = "decoding.json"  # settings with which the model was measured, or those of its training data


class MergedModel(PythonModel):
    """Generates a response for each prompt."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load model and tokenizer."""
        folder = Path(context.artifacts[CHECKPOINT])
        self._model = dparallel.load_model(folder)
        self._tokenizer = dparallel.load_tokenizer(folder)
        saved = json.loads((folder / DECODING).read_text(encoding="utf-8"))
        self._defaults = {**saved, **(context.model_config or {})}

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Responses to the texts in the column `prompt`.

        Args:
            params: settings of `DecodingConfig` that differ from the model's own; `batch_size`; and `chat`,
                which asks each prompt as a user's message with the model's chat template.

        Returns:
            A table with the columns `response`, `nfe` (forward passes), `tokens`, `finish_reason`.
        """
        given = {name: value for name, value in (params or {}).items() if value is not None}
        batch_size, chat = given.pop("batch_size", None), given.pop("chat", False)
        defaults = dict(self._defaults)
        if given.get("rule", defaults.get("rule")) != defaults.get("rule"):
            defaults = {name: value for name, value in defaults.items() if name not in ("threshold", "steps")}
        prompts = [str(prompt) for prompt in model_input["prompt"]]
        completions = dparallel.complete(
            self._model,
            self._tokenizer,
            [[{"role": "user", "content": prompt}] for prompt in prompts] if chat else prompts,
            dparallel.DecodingConfig(**{**defaults, **given}),
            batch_size,
        )
        return pd.DataFrame(
            {
                "response": [completion.text for completion in completions],
                "nfe": [completion.nfe for completion in completions],
                "tokens": [len(completion.tokens) for completion in completions],
                "finish_reason": [completion.finish_reason for completion in completions],
            }
        )


set_model(MergedModel())
