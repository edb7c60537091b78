"""The rules of ``data.harmonise`` in words and numbers, for who runs an exported model without Consilium."""

from __future__ import annotations

from typing import Any

from shared.config import Job
from shared.imaging import stain
from shared.imaging.harmonise import SDS, TAILS
from shared.rules import PERCENTS, landmarks_of, rules_of

Step = dict[str, Any]

_GREY = "The grey values decide (0.299 R + 0.587 G + 0.114 B), of the whole image or volume"
_STRETCH = "value becomes (value - low) / (high - low), clipped to [0, 1]; 0.5 where low = high"


def harmonising(job: Job) -> list[Step]:
    """The steps of the job's rules, in order."""
    return [{"step": rule} | _facts(rule, job) for rule in rules_of(job.data.harmonise)]


def _facts(rule: str, job: Job) -> Step:
    if rule == "polarity":
        return {"how": "If the third central moment of all grey values is negative, replace the image by 1 - image."}
    if rule.endswith("zscore"):
        ends = "low = mean - sds * sd, high = mean + sds * sd (sd over n)"
        return {"sds": SDS, "how": f"{_whose(rule)} {ends}; {_STRETCH}."}
    if rule.endswith("percentiles"):
        tails = "low and high are these percentiles; the least and largest value where both are the same"
        if rule.startswith("site-"):
            tails = "low and high are these percentiles"
        return {"percentiles": list(TAILS), "how": f"{_whose(rule)} {tails}; {_STRETCH}."}
    if rule == "nyul":
        how = (
            f"{_GREY}, values above 0: the percentiles become the landmarks, the largest value 1, 0 stays 0, straight "
            "lines between. Percentiles that are equal: the first landmark if they are the darkest, 1 if the "
            "brightest, else the mean of their landmarks."
        )
        return {"percentiles": list(PERCENTS), "landmarks": list(landmarks_of(job.data.landmarks)), "how": how}
    if rule == "reinhard":
        how = "CIELAB (sRGB, D65): each of L, a, b to this mean and sd (over n), then back, clipped to [0, 1]."
        return {"mean": stain.LAB_MEAN.tolist(), "sd": stain.LAB_SD.tolist(), "how": how}
    how = (
        "Macenko et al. 2009: density = -ln(max(value, 1/255) / lamp), lamp = this percentile of each colour; stains = "
        "directions of the 1st and 99th percentile of the angle in the plane of the two greatest eigenvectors of the "
        "covariance of the pixels whose densities all exceed the least; amounts by least squares, negative ones 0, "
        "scaled so that their 99th percentiles are those given; value = light * exp(-stains @ amounts), clipped to "
        "[0, 1]. Fewer than the least pixels: unchanged."
    )
    figures = {
        "lamp_percentile": stain.GLASS,
        "light": stain.LIGHT,
        "least_density": stain.LEAST_DENSITY,
        "least_pixels": stain.LEAST_STAINED,
    }
    return figures | {"stains": stain.STAINS.tolist(), "amounts": stain.AMOUNTS.tolist(), "how": how}


def _whose(rule: str) -> str:
    if not rule.startswith("site-"):
        return f"{_GREY}:"
    return "Measured once, on the training images of the hospital that the image is from, after the steps before:"
