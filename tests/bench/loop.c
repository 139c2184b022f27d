/* The lone vCPU's loop over uniform mixed touches of 4K pages, as kernels/alone.py has it: the yardstick of the bench. */

#include <stdint.h>

#define GOLDEN 0x9E3779B97F4A7C15ull
#define BLOCK 1024
#define AHEAD 32
#define UNKNOWN 255

static inline uint64_t scramble(uint64_t z)
{
	z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
	z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
	return z ^ (z >> 31);
}

static inline uint64_t draw_state(uint64_t key, uint64_t salt, uint64_t i)
{
	return key + GOLDEN * (4 * i + salt + 1);
}

/* Returns how many touches were made: all, unless a class is unknown. */
int64_t run_loop(uint8_t *restrict pte, const uint8_t *restrict after, int64_t *restrict seen, int64_t step_key, int64_t first,
		 int64_t units, int64_t touches, int64_t write_cut)
{
	static uint64_t block[BLOCK + AHEAD];
	const uint64_t key = scramble(draw_state((uint64_t)step_key, 0, 0));

	for (int64_t index = 0; index < touches; index += BLOCK) {
		const int64_t count = touches - index < BLOCK ? touches - index : BLOCK;
		uint64_t order = draw_state(key, 1, (uint64_t)index), write = draw_state(key, 2, (uint64_t)index);

		for (int64_t i = 0; i < count; i++) {
			const uint64_t page = (uint64_t)first + (((scramble(order) >> 32) * (uint64_t)units) >> 32);

			block[i] = page << 1 | ((int64_t)(scramble(write) >> 11) < write_cut);
			order += 4 * GOLDEN;
			write += 4 * GOLDEN;
		}
		for (int64_t i = 0; i < AHEAD; i++)
			__builtin_prefetch(pte + (block[i] >> 1), 1);
		for (int64_t i = 0; i < count; i++) {
			const uint64_t page = block[i] >> 1, class = pte[page] * 2u + (block[i] & 1);
			const uint8_t state = after[class];

			__builtin_prefetch(pte + (block[i + AHEAD] >> 1), 1);
			if (state == UNKNOWN)
				return index + i;
			pte[page] = state;
			seen[(i & 3) * 256 + class]++;
		}
	}
	return touches;
}
