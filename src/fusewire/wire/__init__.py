"""The FUSE kernel protocol as data: constants, struct layouts, the opcode table, encoders. No I/O, no state."""
