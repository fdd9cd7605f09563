"""A model card in the Hub's form, from the record of a run."""

from huggingface_hub import EvalResult, ModelCardData

from vipr_utils.judge.metrics import DEFINITION

PRODUCTS_10K = 9_691  # products, by which it is known under any name
NON_COMMERCIAL = (
    "Trained on Products-10K, whose photos and annotations are for non-commercial research: so are "
    "these weights."
)
OF_THE_DATA = (
    "Whether these weights may be passed on is for the licences of the photos they were trained on "
    "and of the pretrained weights they started from to say."
)
CARD = """---
{front}
---

# {name}

Embeds photos of products, so that a customer's photo finds the shop's. Similarity is the cosine.

| | |
|---|---|
{rows}

{definition}.

## Limits

Scored on the products of its own gallery; products that it was not trained on score lower. It finds
what looks alike: two variants that differ by a word on the package are easily confused.

## Licence

{licence}
"""


def card(record: dict) -> str:
    """Markdown with YAML front matter, of a record with a score as `runs.load` gives it.

    Raises ValueError for one without: labels were unknown.
    """
    figures = record["metrics"]
    if figures.get("map_at_5") is None:
        raise ValueError(f"run {record['run']} has no score: labels of its queries are unknown")
    licence = NON_COMMERCIAL if _of_products_10k(record) else OF_THE_DATA
    return CARD.format(
        front=_front(record).to_yaml(),
        name=_escaped(record["run"]),
        rows="\n".join(f"| {name} | {_escaped(value)} |" for name, value in _facts(record).items()),
        definition=DEFINITION,
        licence=licence,
    )


def _of_products_10k(record: dict) -> bool:
    return record["data"]["n_products"] == PRODUCTS_10K


def _front(record: dict) -> ModelCardData:
    """The front matter."""
    name, data = (record["model"] or {}).get("name", ""), record["data"]["root"]
    kind = "image-feature-extraction"
    result = EvalResult(
        task_type=kind,
        dataset_type=data,
        dataset_name=data,
        metric_type="map_at_5",
        metric_name="mAP@5",
        metric_value=round(record["metrics"]["map_at_5"], 4),
    )
    return ModelCardData(
        library_name="vipr",
        license="other",
        license_name="products-10k-non-commercial" if _of_products_10k(record) else "see-below",
        pipeline_tag=kind,
        tags=["image-retrieval", "visual-product-recognition", "metric-learning", "timm"],
        base_model=f"timm/{name}" if name and "/" not in name else None,
        model_name=record["run"],
        eval_results=[result],
    )


def _facts(record: dict) -> dict[str, str]:
    """What is known of it, by name."""
    figures, data, model = record["metrics"], record["data"], record["model"] or {}
    low, high = figures["map_at_5_low"], figures["map_at_5_high"]
    return {
        "mAP@5": f"{figures['map_at_5']:.3f}, 95 % over products {low:.3f} to {high:.3f}",
        "P@1": f"{figures['precision_at_1']:.3f}",
        "protocol": f"{record['protocol']}, {figures['n_queries']:,} queries, "
        f"{figures['n_gallery']:,} gallery photos",
        "data": f"{data['root']}: {data['n_train']:,} photos of {data['n_products']:,} products",
        "answers by": (record.get("chosen") or {}).get("what", "plain search"),
        "validation": (record.get("validation") or {}).get("how", "none"),
        "training cut short": record.get("cut_short") or "no",
        "backbone's weights": (model.get("weights") or {}).get("source", "unknown"),
    }


def _escaped(text: str) -> str:
    """Of a name that came with the data, in a Markdown table."""
    return (
        str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    )
