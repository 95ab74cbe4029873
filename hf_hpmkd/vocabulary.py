"""The words that recipes share with data, losses and models. Imports nothing, so that a recipe is checked at once."""

IMAGE_CLASSIFICATION = "image-classification"
TEXT_CLASSIFICATION = "text-classification"
TABULAR_CLASSIFICATION = "tabular-classification"
TASKS = (IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, TABULAR_CLASSIFICATION)

SKLEARN_SETS = ("digits", "iris", "wine", "breast_cancer")  # those that come with scikit-learn; nothing is fetched
DATA_FILES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")  # a data set that is a file ends so

NO_NETWORKS = ("sklearn", "skops", "column")  # families of teachers without layers
SKLEARN_FOLDS = 5  # of scikit-learn teachers, so that none answers a row that it has learned

KD_KINDS = ("forward_kl", "standardized_kl", "dkd", "dist", "js")
TEMPERATURE_SCHEDULES = ("constant", "cosine", "loss", "convergence", "auto", "learned")

# `learned` follows the closed-form gradient of the forward KL through the classifier head, so it serves that kind only.
# DIST compares correlations, which a moving temperature would change together with what they are compared on.
LEGAL_SCHEDULES: dict[str, tuple[str, ...]] = {
    "forward_kl": TEMPERATURE_SCHEDULES,
    "standardized_kl": ("constant", "cosine", "loss", "convergence", "auto"),
    "dkd": ("constant", "cosine", "loss", "convergence", "auto"),
    "dist": ("constant",),
    "js": ("constant", "cosine", "loss", "convergence", "auto"),
}
