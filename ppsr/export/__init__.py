"""Networks as files for other runtimes: ONNX (:mod:`ppsr.export.onnx_file`), checked by running them
(:mod:`ppsr.export.check`), and ExecuTorch (:mod:`ppsr.export.executorch_file`). Needs the extra ``ppsr[export]``.
"""
