"""The words of the demo's instructions, questions and answers, as a vocabulary that needs no data."""

from tokenizers import Tokenizer

from training.tokens import VocabularyConfig, make_vocabulary, prompt_template

LOCATIONS = 32  # along one image axis
QUERIES = 4
DEMO_PROMPT = prompt_template(QUERIES)
DEMO_WORDS = (
    "touch point at red green blue yellow purple white cube ball disc pole Question Answer a the is are there here no "
    "yes none and what which where how many colour shape kind object objects table describe count near ? . ,"
)


def demo_tokenizer(fast_vocab: int = 512) -> Tokenizer:
    return make_vocabulary(VocabularyConfig(queries=QUERIES, locations=LOCATIONS), [DEMO_WORDS], fast_vocab)
