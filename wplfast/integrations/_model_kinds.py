"""Kinds of models of transformers, told by its own tables of classes."""

from __future__ import annotations

#: Kind -> the names of the tables that list its classes, but for "_MAPPING_NAMES". The first kind with a class counts.
_TABLES = {
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",),
    "speech": ("MODEL_FOR_SPEECH_SEQ_2_SEQ",),
    "causal": ("MODEL_FOR_CAUSAL_LM",),
    "image_causal": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT",),
    "masked": ("MODEL_FOR_MASKED_LM",),
    "tokens": ("MODEL_FOR_TOKEN_CLASSIFICATION",),
    "spans": ("MODEL_FOR_QUESTION_ANSWERING",),
    "texts": ("MODEL_FOR_SEQUENCE_CLASSIFICATION",),
    "samples": (
        "MODEL_FOR_IMAGE_CLASSIFICATION",
        "MODEL_FOR_VIDEO_CLASSIFICATION",
        "MODEL_FOR_AUDIO_CLASSIFICATION",
        "MODEL_FOR_MULTIPLE_CHOICE",
        "MODEL_FOR_NEXT_SENTENCE_PREDICTION",
    ),
}


def kind_of(model_class: str | type) -> str | None:
    """Return the kind of a class, by name, or of the first of its bases that transformers lists; None if it lists none.

    Raises:
        ImportError: if transformers is missing.
    """
    from transformers.models.auto import modeling_auto

    kinds = {
        name: kind
        for kind, tables in reversed(_TABLES.items())
        for table in tables
        for entry in getattr(modeling_auto, f"{table}_MAPPING_NAMES", {}).values()
        for name in ((entry,) if isinstance(entry, str) else entry)
    }
    names = [model_class] if isinstance(model_class, str) else [each.__name__ for each in model_class.__mro__]
    return next((kinds[name] for name in names if name in kinds), None)
