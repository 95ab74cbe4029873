"""The `data` section of a recipe: which rows, and how they are cut and varied. Opens nothing."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

Origin = Literal["auto", "train", "validation", "test"]
Size = Annotated[int | float, Field(gt=0)]


@dataclass(config=ConfigDict(extra="forbid"))
class DataConfig:
    """The `data` section of a recipe."""

    path: str = Field(
        description="A data set of the Hub, a folder, a Parquet, CSV, TSV or JSON Lines file or a glob of them, or "
        "sklearn:digits.",
        min_length=1,
    )
    name: str | None = Field(default=None, description="Configuration of the data set, if it has several.")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the Hub; default: the main branch."
    )
    input_column: str | list[str] | None = Field(
        default=None,
        description="Column of the images or texts, the two of pairs of texts, or the list of a table's feature "
        "columns. Default: the image column; else `premise` and `hypothesis`, `sentence1` and `sentence2` or another "
        "usual pair, unless there is a `text` beside them; else `text` or `sentence`; else all but the label.",
    )
    label_column: str = Field(default="label", description="Column of the classes.", min_length=1)
    train_split: str = Field(default="train", description="Split to train on.", min_length=1)
    validation_split: str | None = Field(
        default=None, description="Split for guide and validation rows. Default: the one named validation, if any."
    )
    test_split: str | None = Field(
        default=None,
        description="Split to test on. Default: the one named test, else `test_size` of the training split.",
    )
    guide_from: Origin = Field(
        default="auto",
        description="Split that the guide rows are drawn from. auto: the training split if every teacher is trained on "
        "the spot, since these rows are then kept from the teachers too, or if there is no other split; else the "
        "validation split, else the test split.",
    )
    validation_from: Origin = Field(default="auto", description="The same for the validation rows.")
    guide_size: Size = Field(
        default=0.1, description="Guide rows: a number, or a share below 1 of the split drawn from."
    )
    validation_size: Size = Field(default=0.1, description="Validation rows: a number, or a share below 1.")
    test_size: Size = Field(
        default=0.2, description="Test rows, if there is no test split: a number, or a share below 1."
    )
    max_train_rows: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Keep at most so many training rows (stratified), after the other parts are drawn."
    )
    augmentation: Literal["auto", "none", "crop", "crop_flip", "resized_crop_flip", "word_dropout"] = Field(
        default="auto",
        description="How training rows are varied. auto: crop_flip for colour images up to 64 pixels, crop for grey "
        "or tiny ones, resized_crop_flip above 64 pixels; none for texts and tables, and where a teacher has one "
        "answer per row. word_dropout is for texts: a student that hears teachers sees a fifth of the words left out.",
    )
    max_length: Annotated[int, Field(ge=8)] | None = Field(
        default=None,
        description="Tokens read of each text by the student and by networks trained on the spot. Default: 128, or as "
        "many as a smaller one can. Loaded teachers read up to 512.",
    )
    views: int = Field(default=6, ge=1, description="Different augmented views of each training image or text.")
    seed: int = Field(default=0, ge=0, description="Decides all draws and the augmented views.")
    trust_remote_code: bool = Field(
        default=False, description="Must stay false: loading a data set never runs code that comes with it."
    )

    @field_validator("guide_size", "validation_size", "test_size", mode="before")
    @classmethod
    def _rows_or_share(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, float) and value >= 1):
            raise ValueError(f"must be a whole number of rows or a share below 1, got {value}")
        return value

    @field_validator("trust_remote_code")
    @classmethod
    def _no_remote_code(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "must be false: a data set's own code is never run. Convert the set to Parquet and leave this out"
            )
        return value
