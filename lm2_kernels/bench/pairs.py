"""How many pairs of a token and a slot an attention has."""


def seen_pairs(tokens: int, slots: int, slot_offset: int | None) -> int:
    """Pairs of a token and a slot that it sees: all of them, if there is no ``slot_offset``."""
    if slot_offset is None:
        return tokens * slots
    # token t sees slot_offset + t + 1 slots, until it sees all
    growing = max(min(tokens, slots - slot_offset), 0)
    return growing * slot_offset + growing * (growing + 1) // 2 + (tokens - growing) * slots
