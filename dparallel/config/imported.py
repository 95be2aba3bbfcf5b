"""Settings of published responses, which are read in place of a recording."""

from pydantic import Field, model_validator

from dparallel.config.base import Config


class ImportedConfig(Config):
    """Published responses to the problems, in further columns of the data set of the problems.

    Nothing is decoded. Give `response` or `trajectory`.

    Args:
        response: column of finished responses as text, such as `llm_response` of dParallel's data. The steps
            at which their tokens were committed are not known, so recipes that need them refuse such data.
        trajectory: column of whole trajectories, as d3LLM's: the canvases after each forward pass, each as
            the token ids of prompt and response.
        prompt_ids: column of the token ids of the prompts, for `trajectory` (default: `prompt_ids`).
        correct: column that says whether a response is correct; by default the protocol's scorer does.
    """

    response: str | None = Field(None, min_length=1)
    trajectory: str | None = Field(None, min_length=1)
    prompt_ids: str | None = Field(None, min_length=1)
    correct: str | None = Field(None, min_length=1)

    @property
    def has_steps(self) -> bool:
        """Whether the steps are known at which tokens were committed."""
        return self.trajectory is not None

    @model_validator(mode="after")
    def _consistent(self) -> "ImportedConfig":
        if (self.response is None) == (self.trajectory is None):
            raise ValueError(
                f"response={self.response!r}, trajectory={self.trajectory!r}: give exactly one of them, the "
                "column of the finished texts or that of the canvases"
            )
        if self.prompt_ids is not None and self.trajectory is None:
            raise ValueError(
                f"prompt_ids={self.prompt_ids!r} with response={self.response!r}: prompts of finished texts "
                "are tokenized here; drop prompt_ids"
            )
        return self
