"""What goes on around a training."""

import gc

from hf_hpmkd.classifier_training import old_garbage_left


def test_old_garbage_is_left_for_a_while_and_no_longer() -> None:
    assert gc.get_freeze_count() == 0
    with old_garbage_left():
        assert gc.get_freeze_count() > 1000
        with old_garbage_left():
            pass
        assert gc.get_freeze_count() > 1000  # the outer one still holds
    assert gc.get_freeze_count() == 0
