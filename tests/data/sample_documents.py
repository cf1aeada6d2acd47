"""Made-up documents, each decided by its number."""

WORDS = """
    grid scale level bits round clamp weight latent surrogate threshold step rate loss train batch row block
    token merge byte vocab split fold hash order seed epoch rank world shard resume prefix folder file line
""".split()  # noqa: SIM905


def document(number: int, words: int = 60) -> str:
    """A document that a number decides, never equal to another's."""
    picked = (WORDS[(number * 7 + k * (number % 5 + 1)) % len(WORDS)] for k in range(words))
    return f"{number} " + " ".join(picked)
