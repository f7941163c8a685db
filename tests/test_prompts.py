from captioning.prompts import BY_KIND, DESCRIBE, OWN_TEXT, Prompt


def test_the_default_prompt_is_that_of_i1() -> None:
    assert DESCRIBE.text == "Describe the image in detail using one paragraph."
    assert BY_KIND["describe"] is DESCRIBE


def test_a_template_takes_any_text_literally() -> None:
    template = Prompt("template", "An image of {text}.")
    assert template.fill("a {text} and {0}") == "An image of a {text} and {0}."
    assert OWN_TEXT.fill("as it is") == "as it is"


def test_another_text_has_another_hash() -> None:
    assert Prompt("a", "one").sha256 == Prompt("b", "one").sha256 != Prompt("a", "two").sha256
