"""``python ppsr/train.py -opt …``, BasicSR's habit: the same as ``ppsr train -opt …`` (:mod:`ppsr.training.train`)."""

import sys
from pathlib import Path

if __name__ == '__main__':
    # as a script: the folder that holds the package belongs on the path, the package's inside does not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from ppsr_command import entry

    entry(['train', *sys.argv[1:]])
