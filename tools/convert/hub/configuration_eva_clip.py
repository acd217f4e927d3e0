"""Configuration of an EVA-CLIP model for transformers. Apache-2.0."""

from typing import Any

from transformers import PretrainedConfig


class EvaClipConfig(PretrainedConfig):
    """Sizes and switches of both towers, as `vision_config` and `text_config` mappings."""

    model_type = "clip"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        **rest: Any,
    ):
        self.vision_config, self.text_config = dict(vision_config or {}), dict(text_config or {})
        self.projection_dim, self.logit_scale_init_value = projection_dim, logit_scale_init_value
        super().__init__(**rest)
