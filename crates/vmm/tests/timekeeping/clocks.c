/* Answers questions about clocks and timers, one a line. Runs on the host and in the guest. */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define MILLISECOND 1000000LL

static int64_t now(clockid_t clock)
{
	struct timespec time;
	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static struct timespec timespec_of(int64_t ns)
{
	return (struct timespec){ ns / 1000000000, ns % 1000000000 };
}

static int compare(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
	return (x > y) - (x < y);
}

/* Prints the earliest, the median, the 99th percentile and the latest. */
static void report(int64_t *late, long count)
{
	qsort(late, count, sizeof *late, compare);
	printf("%lld %lld %lld %lld\n", (long long)late[0], (long long)late[count / 2],
	       (long long)late[count - 1 - count / 100], (long long)late[count - 1]);
}

/* Sleeps a millisecond at a time, and says by how many nanoseconds it woke late. Linux may be late by `slack`; 0 is what
 * programs have that don't say. */
static void sleeps(long count, unsigned long slack)
{
	prctl(PR_SET_TIMERSLACK, slack);
	int64_t *late = calloc(count, sizeof *late);
	for (long i = 0; i < count; i++) {
		int64_t due = now(CLOCK_MONOTONIC) + MILLISECOND;
		struct timespec time = timespec_of(due);
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
		late[i] = now(CLOCK_MONOTONIC) - due;
	}
	prctl(PR_SET_TIMERSLACK, 0);
	report(late, count);
	free(late);
}

/* The same by a timer that fires each millisecond. */
static void ticks(long count)
{
	int64_t *late = calloc(count, sizeof *late);
	int timer = timerfd_create(CLOCK_MONOTONIC, 0);
	int64_t first = now(CLOCK_MONOTONIC) + MILLISECOND;
	struct itimerspec times = { timespec_of(MILLISECOND), timespec_of(first) };
	uint64_t passed = 0, expired;
	timerfd_settime(timer, TFD_TIMER_ABSTIME, &times, NULL);
	for (long i = 0; i < count; i++) {
		if (read(timer, &expired, sizeof expired) != sizeof expired)
			exit(1);
		/* Of those that it missed, the last. */
		passed += expired;
		late[i] = now(CLOCK_MONOTONIC) - (first + (int64_t)(passed - 1) * MILLISECOND);
	}
	close(timer);
	report(late, count);
	free(late);
}

/* Moves from processor to processor; counts the steps back of the TSC and of the clock, also since the last time. */
static void migrate(long rounds)
{
	static uint64_t last_tsc;
	static int64_t last;
	long processors = sysconf(_SC_NPROCESSORS_ONLN), tsc_back = 0, clock_back = 0, moved = 0;
	for (long i = 0; i < rounds; i++) {
		cpu_set_t set;
		unsigned cpu;
		CPU_ZERO(&set);
		CPU_SET(i % processors, &set);
		if (sched_setaffinity(0, sizeof set, &set))
			continue;
		uint64_t tsc = __rdtscp(&cpu);
		int64_t time = now(CLOCK_MONOTONIC);
		moved += (cpu & 0xfff) == (unsigned long)(i % processors);
		tsc_back += tsc < last_tsc;
		clock_back += time < last;
		last_tsc = tsc;
		last = time;
	}
	cpu_set_t all;
	memset(&all, 0xff, sizeof all);
	sched_setaffinity(0, sizeof all, &all);
	printf("%ld %ld %ld\n", moved, tsc_back, clock_back);
}

int main(void)
{
	char line[64];
	pid_t load = 0;
	while (fgets(line, sizeof line, stdin)) {
		char word[16] = "";
		long count = 0;
		sscanf(line, "%15s %ld", word, &count);
		if (!strcmp(word, "clock")) {
			unsigned cpu;
			printf("%lld %lld %llu\n", (long long)now(CLOCK_REALTIME),
			       (long long)now(CLOCK_MONOTONIC), (unsigned long long)__rdtscp(&cpu));
		} else if (!strcmp(word, "sleeps")) {
			sleeps(count, 0);
		} else if (!strcmp(word, "prompt")) {
			sleeps(count, 1);
		} else if (!strcmp(word, "ticks")) {
			ticks(count);
		} else if (!strcmp(word, "migrate")) {
			migrate(count);
		} else if (!strcmp(word, "load")) {
			load = fork();
			if (!load)
				for (;;)
					;
			printf("%d\n", load > 0);
		} else if (!strcmp(word, "rest")) {
			printf("%d\n", kill(load, SIGKILL));
		} else if (!strcmp(word, "rtc")) {
			long long time = -1;
			FILE *rtc = fopen("/sys/class/rtc/rtc0/since_epoch", "r");
			if (!rtc || fscanf(rtc, "%lld", &time) != 1)
				time = -1;
			if (rtc)
				fclose(rtc);
			printf("%lld\n", time);
		} else if (!strcmp(word, "set")) {
			printf("%d\n", system("hwclock -s -u"));
		}
		fflush(stdout);
	}
	return 0;
}
