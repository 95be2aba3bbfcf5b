"""Settings of the embedded teacher."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from dparallel.config.base import HOW, Config
from dparallel.config.experiment import Seed
from dparallel.config.paths import LocalPath
from dparallel.config.problems import GENERATED_LIMIT, Embedded


class TeacherConfig(Config):
    """Train the embedded teacher from scratch, or an autoregressive model of the same shape.

    Args:
        out: folder of the model.
        task: the embedded task whose worked solutions are the training data.
        objective: `diffusion`, or `autoregressive` for next-token prediction.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: shape of the model.
        max_position_embeddings: longest sequence in tokens.
        train_steps: number of train steps.
        seed: of the initial weights and of the training rows.
        block_length: for `diffusion` (default 12): half of the training rows, and the responses of the
            final check, are filled block by block.
        batch_size: training rows per train step.
        check_problems: number of problems solved in the final check.
        min_accuracy: accuracy below which the stage fails.
    """

    file_kind: ClassVar[str] = "a tiny teacher: give it to `python -m flows.teacher --config`"

    out: Annotated[LocalPath, HOW]
    # Omitted from dumps at their defaults, so that folders of existing teachers keep their recorded settings.
    task: Embedded = Field("coins", exclude_if=lambda task: task == "coins")
    objective: Literal["diffusion", "autoregressive"] = Field(
        "diffusion", exclude_if=lambda objective: objective == "diffusion"
    )
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 320
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    max_position_embeddings: PositiveInt = 64
    train_steps: PositiveInt
    batch_size: PositiveInt = 64
    block_length: PositiveInt | None = None
    seed: Seed = 0
    check_problems: PositiveInt = Field(default=200, le=GENERATED_LIMIT)
    min_accuracy: float = Field(0.97, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("objective", "diffusion") != "diffusion":
            return data
        return data if data.get("block_length") is not None else data | {"block_length": 12}

    @model_validator(mode="after")
    def _consistent(self) -> "TeacherConfig":
        if self.objective == "autoregressive" and self.block_length is not None:
            raise ValueError(
                f"block_length={self.block_length} with objective='autoregressive', which has no blocks: "
                "drop block_length"
            )
        return self
