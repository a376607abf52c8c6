/* The content of the floor benchmark's one file: 32-bit words that repeat every PATTERN_BYTES and differ within. */
#ifndef PATTERN_H
#define PATTERN_H
#include <stdint.h>

enum { PATTERN_BYTES = 1 << 20, PATTERN_WORDS = PATTERN_BYTES / 4 };

static void fill_pattern(uint32_t *words)
{
    for (uint32_t i = 0; i < PATTERN_WORDS; i++)
        words[i] = i * 2654435761u; /* odd, so every word is another one */
}
#endif
