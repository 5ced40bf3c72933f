from __future__ import annotations

import numpy as np
import pytest
import torch

from fasterase.errors import InputError
from fasterase.evaluation.zero_shot import (
    check_class_names,
    check_templates,
    encode_classes,
    labeller,
    score_accuracy,
)


@pytest.mark.parametrize(
    ("meta", "captions", "expected"),
    [
        ({"class": "Dog"}, ["a photo of a cat."], "dog"),
        ({}, ["a photo of a Dog."], "dog"),
        ({}, ["dog"], "dog"),
        ({}, ["a hot dog, please"], "hot dog"),
        ({}, ["a dog eats a hot dog"], None),
        ({}, ["a dog eats a hot dog", "a dog"], "dog"),
        ({}, ["the doghouse"], None),
        ({}, ["something", "a cat (asleep)"], "cat"),
        ({"class": "horse"}, ["a c++ book"], "c++"),
        ({}, ["ids [1, 2]"], None),
    ],
)
def test_the_class_is_the_source_s_or_the_only_one_named(meta, captions, expected) -> None:
    names = ["dog", "cat", "hot dog", "c++"]
    assert dict(enumerate(names)).get(labeller(names)(meta, captions)) == expected


def test_accuracy_is_of_the_nearest_mean_prompt() -> None:
    torch.manual_seed(0)
    prompts: list[str] = []
    vectors = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)

    def encode(texts: list[str]) -> torch.Tensor:
        prompts.extend(texts)
        return vectors

    classes = encode_classes(encode, ["dog", "cat", "hen"], ["a {}", "the {}"])
    assert prompts == ["a dog", "the dog", "a cat", "the cat", "a hen", "the hen"]
    image = torch.nn.functional.normalize(torch.randn(40, 8), dim=1)
    labels = np.array([-1 if i % 5 == 0 else i % 3 for i in range(40)])
    found = score_accuracy(image, classes, labels)
    for i, label in enumerate(labels):
        if label < 0:
            assert np.isnan(found[i])
            continue
        means = [vectors[2 * c : 2 * c + 2].mean(0) for c in range(3)]
        cosines = [float(image[i] @ m / m.norm()) for m in means]
        assert found[i] == (int(np.argmax(cosines)) == label)


def test_names_and_templates_are_checked() -> None:
    assert check_class_names(["dog", "Dog", "cat"]) == ["dog", "cat"]
    assert check_class_names(None) is None
    assert check_templates(None) == ("a photo of a {}.",)
    assert check_templates("a {}") == ("a {}",)
    for names in ("dog", ["dog"], ["dog", 3], []):
        with pytest.raises(InputError, match="class_names"):
            check_class_names(names)  # type: ignore[arg-type]
    prompts: list[str] = []
    encode = lambda texts: (prompts.extend(texts), torch.eye(len(texts)))[1]  # noqa: E731
    encode_classes(encode, ["dog"], check_templates(["a {} in {place}"]))
    assert prompts == ["a dog in {place}"]
    for templates in ([], ["a photo"], ["{} and {}"], [3]):
        with pytest.raises(InputError, match="templates"):
            check_templates(templates)  # type: ignore[arg-type]
