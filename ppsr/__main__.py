from ppsr_command import entry

entry()
