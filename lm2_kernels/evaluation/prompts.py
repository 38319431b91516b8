"""Prompts for instructed models: what the task is, examples, how to answer, context and question.

The form is that of BABILong's prompts, the words are not: figures by them are not those of its
leaderboard.
"""

import dataclasses

from lm2_kernels.evaluation.samples import Sample

__all__ = ["prompt"]


@dataclasses.dataclass(frozen=True)
class _Prompt:
    task: str  # what the text holds and what is asked
    answer: str  # how to answer
    examples: tuple[tuple[str, str, str], ...]  # context, question, answer


_ONE_PLACE = "Answer with the name of one place and nothing else."
_YES_NO = "Answer with yes or no and nothing else."
_WHERE_ABOUTS = (
    "Somewhere in the text it says which places people go to. The question asks where a "
    "person is now. Whatever is said later about a person replaces what was said before."
)
_PROMPTS = {
    "qa1": _Prompt(
        _WHERE_ABOUTS,
        _ONE_PLACE,
        (
            ("John moved to the office. Mary went to the kitchen.", "Where is John?", "office"),
            (
                "Daniel went to the garden. Sandra journeyed to the hallway. Daniel travelled to "
                "the bedroom.",
                "Where is Daniel?",
                "bedroom",
            ),
        ),
    ),
    "qa2": _Prompt(
        "Somewhere in the text it says where people go, and what they pick up and leave. The "
        "question asks where a thing is now. What somebody carries goes wherever that person goes.",
        _ONE_PLACE,
        (
            (
                "Mary went to the office. Mary took the milk there. Mary moved to the garden.",
                "Where is the milk?",
                "garden",
            ),
            (
                "John moved to the kitchen. John got the apple there. John dropped the apple. John "
                "went to the hallway.",
                "Where is the apple?",
                "kitchen",
            ),
        ),
    ),
    "qa3": _Prompt(
        "Somewhere in the text it says where people go, and what they pick up and leave. The "
        "question asks where a thing was just before it last came to a place.",
        _ONE_PLACE,
        (
            (
                "Sandra took the football. Sandra went to the bedroom. Sandra moved to the "
                "hallway. Sandra left the football.",
                "Where was the football before the hallway?",
                "bedroom",
            ),
            (
                "John got the milk. John journeyed to the garden. John went to the kitchen. John "
                "travelled to the office.",
                "Where was the milk before the kitchen?",
                "garden",
            ),
        ),
    ),
    "qa4": _Prompt(
        "Somewhere in the text it says how places lie to one another. The question asks which "
        "place lies in a direction.",
        _ONE_PLACE,
        (
            (
                "The garden is north of the kitchen. The office is south of the kitchen.",
                "What is north of the kitchen?",
                "garden",
            ),
            (
                "The hallway is east of the bedroom. The bathroom is west of the bedroom.",
                "What is the bedroom east of?",
                "bathroom",
            ),
        ),
    ),
    "qa5": _Prompt(
        "Somewhere in the text it says who gives what to whom. The question asks for the "
        "giver, the receiver or the thing. The last time that fits is meant.",
        "Answer with one name or one thing and nothing else.",
        (
            (
                "Fred got the milk there. Fred gave the milk to Mary.",
                "Who received the milk?",
                "Mary",
            ),
            (
                "Jeff took the apple there. Jeff handed the apple to Bill.",
                "What did Jeff give to Bill?",
                "apple",
            ),
        ),
    ),
    "qa6": _Prompt(
        "Somewhere in the text it says which places people go to. The question asks whether a "
        "person is in a place now.",
        _YES_NO,
        (
            ("John went to the garden. Mary moved to the office.", "Is John in the garden?", "yes"),
            (
                "Mary moved to the hallway. Mary went to the kitchen.",
                "Is Mary in the hallway?",
                "no",
            ),
        ),
    ),
    "qa7": _Prompt(
        "Somewhere in the text it says what people pick up, leave and hand on. The question "
        "asks how many things a person is carrying now.",
        "Answer with none, one, two or three and nothing else.",
        (
            (
                "Mary got the milk there. Mary took the apple there.",
                "How many objects is Mary carrying?",
                "two",
            ),
            (
                "John took the football there. John dropped the football.",
                "How many objects is John carrying?",
                "none",
            ),
        ),
    ),
    "qa8": _Prompt(
        "Somewhere in the text it says what people pick up and leave. The question asks for "
        "everything that a person is carrying now.",
        "Answer with the things, a comma between them, or with nothing, and no other word.",
        (
            (
                "Mary got the milk there. Mary took the apple there.",
                "What is Mary carrying?",
                "milk,apple",
            ),
            (
                "John took the football there. John dropped the football.",
                "What is John carrying?",
                "nothing",
            ),
        ),
    ),
    "qa9": _Prompt(
        "Somewhere in the text it says where people are, where they go, and where they are "
        "not. The question asks whether a person is in a place now.",
        _YES_NO,
        (
            (
                "Sandra is in the garden. Sandra is no longer in the garden.",
                "Is Sandra in the garden?",
                "no",
            ),
            (
                "Daniel is not in the office. Daniel went to the kitchen.",
                "Is Daniel in the kitchen?",
                "yes",
            ),
        ),
    ),
    "qa10": _Prompt(
        "Somewhere in the text it says where people are, or that they are in one of two "
        "places. The question asks whether a person is in a place now.",
        "Answer with yes, no, or maybe if the text leaves it open, and nothing else.",
        (
            (
                "Bill is either in the park or the school.",
                "Is Bill in the school?",
                "maybe",
            ),
            (
                "Julie is either in the office or the park. Julie moved to the cinema.",
                "Is Julie in the park?",
                "no",
            ),
        ),
    ),
    "qa11": _Prompt(
        _WHERE_ABOUTS + " He or she is the person of the sentence before.",
        _ONE_PLACE,
        (
            (
                "Mary went to the office. Then she moved to the garden.",
                "Where is Mary?",
                "garden",
            ),
        ),
    ),
    "qa12": _Prompt(
        _WHERE_ABOUTS + " Two people may go together.",
        _ONE_PLACE,
        (("John and Mary moved to the kitchen.", "Where is Mary?", "kitchen"),),
    ),
    "qa13": _Prompt(
        _WHERE_ABOUTS + " Two people may go together; they are the two of the sentence before.",
        _ONE_PLACE,
        (
            (
                "John and Mary went to the office. After that they moved to the hallway.",
                "Where is John?",
                "hallway",
            ),
        ),
    ),
    "qa14": _Prompt(
        "Somewhere in the text it says who went where at which time: yesterday, this morning, "
        "this afternoon or this evening, in any order. The question asks where a person was before "
        "a place.",
        _ONE_PLACE,
        (
            (
                "This morning Fred went to the park. Yesterday Fred travelled to the school.",
                "Where was Fred before the park?",
                "school",
            ),
        ),
    ),
    "qa15": _Prompt(
        "Somewhere in the text it says which animals are afraid of which, and what animal "
        "somebody is. The question asks what somebody is afraid of.",
        "Answer with one kind of animal, in the singular, and nothing else.",
        (
            (
                "Mice are afraid of cats. Emily is a mouse.",
                "What is emily afraid of?",
                "cat",
            ),
        ),
    ),
    "qa16": _Prompt(
        "Somewhere in the text it says what animals somebody is and of which colour. Animals "
        "of a kind have one colour. The question asks for a colour.",
        "Answer with one colour and nothing else.",
        (
            (
                "Lily is a swan. Lily is white. Greg is a swan.",
                "What color is Greg?",
                "white",
            ),
        ),
    ),
    "qa17": _Prompt(
        "Somewhere in the text it says how shapes lie to one another. The question asks "
        "whether one lies so to another.",
        _YES_NO,
        (
            (
                "The blue square is above the triangle. The pink rectangle is below the triangle.",
                "Is the blue square above the pink rectangle?",
                "yes",
            ),
        ),
    ),
    "qa18": _Prompt(
        "Somewhere in the text it says what is bigger than what, or fits inside it. The "
        "question asks whether one thing fits into another, or is bigger.",
        _YES_NO,
        (
            (
                "The box fits inside the chest. The chest is bigger than the chocolate.",
                "Does the chest fit in the box?",
                "no",
            ),
        ),
    ),
    "qa19": _Prompt(
        "Somewhere in the text it says how places lie to one another. The question asks for "
        "the way from one to another, which takes two steps.",
        "Answer with the first letters of two directions (n, s, e or w), a comma between them, in "
        "the order of the steps, and nothing else.",
        (
            (
                "The office is north of the kitchen. The garden is east of the office.",
                "How do you go from the kitchen to the garden?",
                "n,e",
            ),
        ),
    ),
    "qa20": _Prompt(
        "Somewhere in the text it says how people feel and what they do. The question asks "
        "where somebody will go, or why somebody did something.",
        "Answer with one place, or with one word for how the person felt, and nothing else.",
        (
            ("Yann is bored.", "Where will yann go?", "garden"),
            (
                "Jason is thirsty. Jason went to the kitchen.",
                "Why did jason go to the kitchen?",
                "thirsty",
            ),
        ),
    ),
    "niah": _Prompt(
        "Somewhere in the text it tells the secret word of a name. The question asks for it.",
        "Answer with the secret word and nothing else.",
        (
            (
                "The secret word of heather slate is bottle.",
                "What is the secret word of heather slate?",
                "bottle",
            ),
        ),
    ),
    "niah_multikey": _Prompt(
        "Somewhere in the text it tells the secret words of several names. The question asks "
        "for that of one name.",
        "Answer with the secret word and nothing else.",
        (
            (
                "The secret word of slate daisy is bottle. The secret word of heather tin is "
                "needle.",
                "What is the secret word of slate daisy?",
                "bottle",
            ),
        ),
    ),
    "vt": _Prompt(
        "Somewhere in the text it says what variables hold: a word, or the same as another "
        "variable. The question asks which variables hold a word, directly or by others.",
        "Answer with all their names, a comma between them, and no other word.",
        (
            (
                "The variable slate holds bottle. The variable daisy holds needle. The variable "
                "heather holds what the variable slate holds.",
                "Which variables hold bottle?",
                "slate,heather",
            ),
        ),
    ),
    "mqar": _Prompt(
        "Somewhere in the text there are pairs of two words, a key and its value. The question "
        "names a key.",
        "Answer with its value and nothing else.",
        (("heather bottle. slate needle. daisy shovel.", "slate?", "needle"),),
    ),
    "stories": _Prompt(
        "Somewhere in the text it says which place somebody entered, and with whom a "
        "thing is. The last ones hold. Asked after a person, the answer is the place; asked after "
        "a thing, it is the person who has it and then that person's place.",
        "Answer with these one or two words and nothing else.",
        (
            (
                "ann entered barn. coin with ann. ann entered tower.",
                "where coin?",
                "ann tower",
            ),
        ),
    ),
}


def prompt(task_name: str, sample: Sample) -> str:
    """What a model is given to go on with.

    Args:
        task_name: ``qa1`` and so on: whose instruction and examples.
        sample: its context and question come last, in the markup of the examples.

    Raises:
        ValueError: there is no such task.
    """
    if task_name not in _PROMPTS:
        raise ValueError(f"there is no prompt for {task_name!r}, but for {', '.join(_PROMPTS)}")
    parts = _PROMPTS[task_name]
    examples = "\n\n".join(
        f"<example>\n{_asked(context, question)} {answer}\n</example>"
        for context, question, answer in parts.examples
    )
    asked = _asked(f"<context>\n{sample.context}\n</context>", sample.question)
    # the instruction's promise about what to answer comes after the examples, as in BABILong's
    return f"{parts.task}\n\n{examples}\n\n{parts.answer}\n\n{asked}"


def _asked(context: str, question: str) -> str:
    return f"{context}\nQuestion: {question}\nAnswer:"
