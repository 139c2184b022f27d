/*
 * litmus: runs page-touch cases on the KVM of the kernel it runs on, and prints what that kernel counted, step by step.
 *
 * usage: litmus CASES [SECONDS]
 *
 * CASES holds one line per case; SECONDS is the uptime after which no further case is begun (0: none). A line is
 *     case ID BACKING PAGES SHIFT GUEST_PAGE VCPUS ; STEP ; STEP ...
 *     set PATH VALUE                   writes a setting of the kernel (for the cases that follow)
 * ID: a number. SHIFT: pages by which the host address is shifted against the guest address. GUEST_PAGE: 4k or 2m. Steps:
 *     touch VCPU LIST [VCPU LIST ...]  guest accesses, all vCPUs at once
 *     host LIST                        the same accesses by this process
 *     populate r|w                     MADV_POPULATE_READ or _WRITE
 *     pre_fault                        KVM_PRE_FAULT_MEMORY
 *     dontneed FIRST SIZE EVERY CALLS  MADV_DONTNEED, CALLS times (pages)
 *     collapse FIRST SIZE              MADV_COLLAPSE
 *     fork | child_exit | log on|off|get
 * LIST: accesses in order, joined by commas: r or w, or p for a read and a write, then FIRST[+COUNT[*STRIDE]] in pages.
 *
 * Output: lines "fs1 KIND ... *CRC32" and nothing else that counts, so that a line which the console tore is noticed:
 *     fs1 kernel KEY=VALUE ...         release and parameters of KVM
 *     fs1 base ID COUNTER=VALUE ...    an empty step: what the way out of the guest costs; gauges before the first step
 *     fs1 step ID NUMBER COUNTER=VALUE ...
 *     fs1 end ID STEPS | fs1 fail ID TEXT | fs1 late ID | fs1 trouble TEXT | fs1 done CASES
 *
 * The guest is a loop at CPL 3 in long mode over page tables of its own with A and D preset: it takes an entry of a list (a
 * guest address, bit 0 set for a store), accesses it, and ends with a store to an address without a memslot. Code, tables and
 * lists lie in shared memory that is filled and mapped before anything is counted, so that data faults are all that happens.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/perf_event.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef KVM_PRE_FAULT_MEMORY
struct kvm_pre_fault_memory { uint64_t gpa, size, flags, padding[5]; };
#define KVM_PRE_FAULT_MEMORY _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)
#endif

enum { PAGE = 4096, MAX_VCPUS = 16, CASE_SECONDS = 240, STACK_BYTES = 256 << 10 };
static const uint64_t HUGE_2M = 2ul << 20;
static const uint64_t MAX_PAGES = (1ul << 30) / PAGE;

/* Guest-physical addresses; the guest's own tables map all of them one to one. */
static const uint64_t GPA_LOW = 0, GPA_LISTS = 0x20000000, GPA_DATA = 0x40000000, GPA_NOWHERE = 0xd0000000;
enum { SLOT_LOW, SLOT_LISTS, SLOT_DATA };
enum { PML4_AT = 8, PDPT_AT = 9, PD_AT = 10, LOW_PAGES = 16 }; /* page 0: code, out of reach of a prefetch of 8 neighbours */
enum { PTE_PRESENT_RW_US_A = 0x27, PTE_DIRTY = 0x40, PDE_LEAF = 0x80 };

static const unsigned char GUEST_CODE[] = {
	0x48, 0x85, 0xc9,       /* 00: test rcx, rcx      entries left */
	0x74, 0x12,             /* 03: jz 17                           */
	0x48, 0xad,             /* 05: lodsq              rax = entry  */
	0xa8, 0x01,             /* 07: test al, 1                      */
	0x75, 0x04,             /* 09: jnz 0f                          */
	0x8a, 0x18,             /* 0b: mov bl, [rax]      load         */
	0xeb, 0x03,             /* 0d: jmp 12                          */
	0x88, 0x58, 0xff,       /* 0f: mov [rax - 1], bl  store        */
	0x48, 0xff, 0xc9,       /* 12: dec rcx                         */
	0xeb, 0xe9,             /* 15: jmp 00                          */
	0x88, 0x1f,             /* 17: mov [rdi], bl      out          */
	0xeb, 0xfc,             /* 19: jmp 17                          */
};

enum source { VCPU_STAT, VM_STAT, TRACEPOINT, VMSTAT, SMAPS, FAULTS };
struct counter { const char *name; enum source source; const char *key; bool gauge; };
static const struct counter COUNTERS[] = {
	{ "pf_taken", VCPU_STAT, "pf_taken", false },
	{ "pf_fixed", VCPU_STAT, "pf_fixed", false },
	{ "pf_spurious", VCPU_STAT, "pf_spurious", false },
	{ "pf_fast", VCPU_STAT, "pf_fast", false },
	{ "pf_emulate", VCPU_STAT, "pf_emulate", false },
	{ "exits", VCPU_STAT, "exits", false },
	{ "remote_tlb_flush", VM_STAT, "remote_tlb_flush", false },
	{ "remote_tlb_flush_requests", VM_STAT, "remote_tlb_flush_requests", false },
	{ "pages_4k", VM_STAT, "pages_4k", true },
	{ "pages_2m", VM_STAT, "pages_2m", true },
	{ "pages_1g", VM_STAT, "pages_1g", true },
	{ "invalidate_range_start", TRACEPOINT, "kvm_unmap_hva_range", false },
	{ "change_pte", TRACEPOINT, "kvm_set_spte_hva", false },
	{ "thp_fault_alloc", VMSTAT, "thp_fault_alloc", false },
	{ "thp_fault_fallback", VMSTAT, "thp_fault_fallback", false },
	{ "thp_split_pmd", VMSTAT, "thp_split_pmd", false },
	{ "thp_collapse_alloc", VMSTAT, "thp_collapse_alloc", false },
	{ "rss", SMAPS, "Rss", true },
	{ "anon_huge", SMAPS, "AnonHugePages", true },
	{ "private_hugetlb", SMAPS, "Private_Hugetlb", true },
	{ "shared_hugetlb", SMAPS, "Shared_Hugetlb", true },
	{ "pgfault", FAULTS, "vcpus", false },
	{ "vmm_pgfault", FAULTS, "vmm", false },
};
enum { COUNTERS_LEN = sizeof COUNTERS / sizeof *COUNTERS, ABSENT = -1 };
struct counts { int64_t value[COUNTERS_LEN]; };

struct backing { const char *name; int map_flags; bool memfd; unsigned memfd_flags; int advice; uint64_t page; };
static const struct backing BACKINGS[] = {
	{ "anonymous", MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, false, 0, MADV_NOHUGEPAGE, 2ul << 20 },
	{ "anonymous_thp", MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, false, 0, MADV_HUGEPAGE, 2ul << 20 },
	{ "anonymous_default", MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, false, 0, MADV_NORMAL, 2ul << 20 },
	{ "anonymous_hugetlb_2mb", MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | 21 << 26, false, 0, MADV_NORMAL, 2ul << 20 },
	{ "anonymous_hugetlb_1gb", MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | 30 << 26, false, 0, MADV_NORMAL, 1ul << 30 },
	{ "shared_hugetlb_2mb", MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB | 21 << 26, false, 0, MADV_NORMAL, 2ul << 20 },
	{ "shared_hugetlb_1gb", MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB | 30 << 26, false, 0, MADV_NORMAL, 1ul << 30 },
	{ "shmem", MAP_SHARED | MAP_NORESERVE, true, 0, MADV_NOHUGEPAGE, 2ul << 20 },
	{ "shmem_thp", MAP_SHARED | MAP_NORESERVE, true, 0, MADV_HUGEPAGE, 2ul << 20 },
	{ "private_memfd", MAP_PRIVATE | MAP_NORESERVE, true, 0, MADV_NOHUGEPAGE, 2ul << 20 },
};

struct vcpu {
	int fd, stats;
	struct kvm_run *run;
	size_t entries;        /* of its list */
	long faults;           /* minor faults of its thread in the last run */
	pthread_t thread;
};

static struct {
	long id;
	const struct backing *backing;
	uint64_t pages, shift, lists_capacity; /* capacity: entries per vCPU */
	bool small_guest_pages, nested_paging, logging;
	int vcpus, kvm, vm, vm_stats, tracepoint[COUNTERS_LEN];
	size_t stat_at[COUNTERS_LEN], low_bytes, lists_bytes, vma_bytes;
	char *low, *vma, *data, *scratch;
	uint64_t *lists;
	struct vcpu vcpu[MAX_VCPUS];
	long vmm_faults;
	pid_t child;
} c;
static pthread_barrier_t begin_run, end_run;

/* ------------------------------------------------------------------------------------------------------------ output */

static uint32_t crc32_of(const char *text, size_t length)
{
	uint32_t crc = ~0u;
	for (size_t i = 0; i < length; i++) {
		crc ^= (unsigned char)text[i];
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
	}
	return ~crc;
}

static void emit(const char *format, ...)
{
	char line[2048];
	va_list list;
	va_start(list, format);
	int length = vsnprintf(line, sizeof line - 16, format, list);
	va_end(list);
	if (length > (int)sizeof line - 17)
		length = sizeof line - 17;
	for (int i = 0; i < length; i++)
		if (line[i] < ' ' || line[i] > '~')
			line[i] = '?';
	length += sprintf(line + length, " *%08x\n", crc32_of(line, length));
	for (int done = 0, wrote; done < length; done += wrote)
		if ((wrote = write(STDOUT_FILENO, line + done, length - done)) <= 0)
			_exit(2);
}

static void __attribute__((noreturn)) fail(const char *format, ...)
{
	char text[512];
	int error = errno;
	va_list list;
	va_start(list, format);
	vsnprintf(text, sizeof text, format, list);
	va_end(list);
	emit("fs1 fail %ld %s: %s", c.id, text, strerror(error));
	if (c.child > 0)
		kill(c.child, SIGKILL);
	_exit(1);
}

static long sure(long result, const char *what)
{
	if (result < 0)
		fail("%s", what);
	return result;
}

/* ---------------------------------------------------------------------------------------------------------- counters */

static void find_stats(int fd, enum source source)
{
	struct kvm_stats_header header;
	sure(pread(fd, &header, sizeof header, 0), "KVM statistics");
	size_t size = sizeof(struct kvm_stats_desc) + header.name_size;
	char *descriptors = malloc(size * header.num_desc);
	sure(pread(fd, descriptors, size * header.num_desc, header.desc_offset), "KVM statistics");
	for (unsigned i = 0; i < header.num_desc; i++) {
		struct kvm_stats_desc *found = (void *)(descriptors + i * size);
		for (int n = 0; n < COUNTERS_LEN; n++)
			if (COUNTERS[n].source == source && !strcmp(COUNTERS[n].key, found->name))
				c.stat_at[n] = header.data_offset + found->offset;
	}
	free(descriptors);
}

static int64_t stat_value(int fd, size_t at)
{
	uint64_t value = 0;
	sure(pread(fd, &value, sizeof value, at), "KVM statistics");
	return value;
}

static void open_tracepoint(int n)
{
	char path[128], filter[128];
	int id;
	c.tracepoint[n] = ABSENT;
	snprintf(path, sizeof path, "/sys/kernel/tracing/events/kvm/%s/id", COUNTERS[n].key);
	FILE *file = fopen(path, "r");
	if (!file)
		return;
	bool known = fscanf(file, "%d", &id) == 1;
	fclose(file);
	if (!known)
		return;
	struct perf_event_attr attr = { .type = PERF_TYPE_TRACEPOINT, .size = sizeof attr, .config = id, .inherit = 1 };
	int fd = syscall(SYS_perf_event_open, &attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
	if (fd < 0)
		return;
	unsigned long start = (uintptr_t)c.data, end = start + c.pages * PAGE;
	if (!strcmp(COUNTERS[n].key, "kvm_unmap_hva_range"))
		snprintf(filter, sizeof filter, "start < %lu && end > %lu", end, start);
	else
		snprintf(filter, sizeof filter, "hva < %lu && hva >= %lu", end, start);
	sure(ioctl(fd, PERF_EVENT_IOC_SET_FILTER, filter), "filter of a tracepoint");
	c.tracepoint[n] = fd;
}

static void read_vmstat(struct counts *counts)
{
	char key[80];
	long value;
	FILE *file = fopen("/proc/vmstat", "r");
	if (!file)
		fail("/proc/vmstat");
	while (fscanf(file, "%79s %ld", key, &value) == 2)
		for (int n = 0; n < COUNTERS_LEN; n++)
			if (COUNTERS[n].source == VMSTAT && !strcmp(COUNTERS[n].key, key))
				counts->value[n] = value;
	fclose(file);
}

static void read_smaps(struct counts *counts)
{
	char line[512], key[64];
	unsigned long start, end, kib;
	bool ours = false;
	FILE *file = fopen("/proc/self/smaps", "r");
	if (!file)
		fail("/proc/self/smaps");
	while (fgets(line, sizeof line, file)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			ours = start < (uintptr_t)c.vma + c.vma_bytes && end > (uintptr_t)c.vma;
		else if (ours && sscanf(line, "%63[^:]: %lu kB", key, &kib) == 2)
			for (int n = 0; n < COUNTERS_LEN; n++)
				if (COUNTERS[n].source == SMAPS && !strcmp(COUNTERS[n].key, key))
					counts->value[n] += kib << 10;
	}
	fclose(file);
}

static int64_t counter_value(int n)
{
	int64_t sum = 0;
	switch (COUNTERS[n].source) {
	case VCPU_STAT:
		for (int v = 0; v < c.vcpus; v++)
			sum += c.stat_at[n] ? stat_value(c.vcpu[v].stats, c.stat_at[n]) : 0;
		return c.stat_at[n] ? sum : ABSENT;
	case VM_STAT:
		return c.stat_at[n] ? stat_value(c.vm_stats, c.stat_at[n]) : ABSENT;
	case TRACEPOINT:
		return c.tracepoint[n] != ABSENT && read(c.tracepoint[n], &sum, sizeof sum) == sizeof sum ? sum : ABSENT;
	default:
		return 0;
	}
}

static struct counts take_counts(void)
{
	struct counts counts;
	for (int n = 0; n < COUNTERS_LEN; n++)
		counts.value[n] = counter_value(n);
	read_vmstat(&counts);
	read_smaps(&counts);
	return counts;
}

static void emit_counts(const char *head, const struct counts *before, const struct counts *after)
{
	char text[1600];
	int length = 0;
	for (int n = 0; n < COUNTERS_LEN; n++) {
		int64_t value = after->value[n] - (COUNTERS[n].gauge ? 0 : before->value[n]);
		if (COUNTERS[n].source == FAULTS) {
			value = *COUNTERS[n].key == 'v' && COUNTERS[n].key[1] == 'm' ? c.vmm_faults : 0;
			for (int v = 0; v < c.vcpus && !strcmp(COUNTERS[n].key, "vcpus"); v++)
				value += c.vcpu[v].faults;
		}
		if (after->value[n] != ABSENT)
			length += snprintf(text + length, sizeof text - length, " %s=%lld", COUNTERS[n].name, (long long)value);
	}
	emit("%s%s", head, text);
}

static long minor_faults(void)
{
	struct rusage usage;
	memset(&usage, 0, sizeof usage); /* a copied stack page must not fault inside the call */
	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_minflt;
}

/* ------------------------------------------------------------------------------------------------------------- guest */

static void *map_shared(size_t bytes)
{
	void *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED)
		fail("memory of %zu bytes", bytes);
	return memory;
}

static void set_slot(int slot, uint64_t gpa, void *memory, size_t bytes, uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = bytes, .userspace_addr = (uintptr_t)memory,
	};
	sure(ioctl(c.vm, KVM_SET_USER_MEMORY_REGION, &region), "memslot");
}

/* A region of the VMA begins at a multiple of the backing's huge page, apart from every other mapping. */
static void map_data(void)
{
	uint64_t page = c.backing->page, offset = c.shift * PAGE % page, bytes = c.pages * PAGE;
	c.vma_bytes = (offset + bytes + page - 1) / page * page;
	char *reserved = mmap(0, c.vma_bytes + 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (reserved == MAP_FAILED)
		fail("address space of %lu bytes", (unsigned long)c.vma_bytes);
	c.vma = (char *)(((uintptr_t)reserved / page + 2) * page);
	int fd = -1;
	if (c.backing->memfd) {
		fd = sure(memfd_create("litmus", MFD_CLOEXEC | c.backing->memfd_flags), "memfd");
		sure(ftruncate(fd, c.vma_bytes), "memfd");
	}
	if (mmap(c.vma, c.vma_bytes, PROT_READ | PROT_WRITE, c.backing->map_flags | MAP_FIXED, fd, 0) == MAP_FAILED)
		fail("mapping %s", c.backing->name);
	if (c.backing->advice != MADV_NORMAL)
		sure(madvise(c.vma, c.vma_bytes, c.backing->advice), "madvise");
	c.data = c.vma + offset;
}

static void build_tables(void)
{
	uint64_t *pml4 = (void *)(c.low + PML4_AT * PAGE), *pdpt = (void *)(c.low + PDPT_AT * PAGE);
	memcpy(c.low, GUEST_CODE, sizeof GUEST_CODE);
	pml4[0] = GPA_LOW + PDPT_AT * PAGE + PTE_PRESENT_RW_US_A;
	for (uint64_t i = 0; i < 4 * 512; i++) {
		uint64_t *pd = (void *)(c.low + (PD_AT + i / 512) * PAGE), address = i * HUGE_2M;
		uint64_t part = (address - GPA_DATA) / HUGE_2M; /* which 2 MiB of the data */
		pdpt[i / 512] = GPA_LOW + (PD_AT + i / 512) * PAGE + PTE_PRESENT_RW_US_A;
		pd[i % 512] = address + PTE_PRESENT_RW_US_A + PTE_DIRTY + PDE_LEAF;
		if (!c.small_guest_pages || address < GPA_DATA || part >= (c.pages + 511) / 512)
			continue;
		uint64_t *table = (void *)(c.low + (LOW_PAGES + part) * PAGE);
		pd[i % 512] = GPA_LOW + (LOW_PAGES + part) * PAGE + PTE_PRESENT_RW_US_A;
		for (int entry = 0; entry < 512; entry++)
			table[entry] = address + entry * PAGE + PTE_PRESENT_RW_US_A + PTE_DIRTY;
	}
}

static void make_vcpu(struct vcpu *vcpu, int number, struct kvm_cpuid2 *cpuid)
{
	struct kvm_segment code = { .limit = ~0u, .selector = 0x1b, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = { .limit = ~0u, .selector = 0x23, .type = 3, .present = 1, .dpl = 3, .s = 1, .db = 1, .g = 1 };
	struct kvm_sregs sregs;
	vcpu->fd = sure(ioctl(c.vm, KVM_CREATE_VCPU, number), "KVM_CREATE_VCPU");
	long size = sure(ioctl(c.kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	vcpu->run = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED)
		fail("kvm_run");
	sure(ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
	sure(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
	sregs.cr3 = GPA_LOW + PML4_AT * PAGE;
	sregs.cr4 = 0x20;   /* PAE */
	sregs.efer = 0x500; /* LMA LME */
	sure(ioctl(vcpu->fd, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	vcpu->stats = sure(ioctl(vcpu->fd, KVM_GET_STATS_FD, 0), "KVM_GET_STATS_FD");
}

static void run_guest(struct vcpu *vcpu)
{
	uint64_t list = GPA_LISTS + (vcpu - c.vcpu) * c.lists_capacity * sizeof(uint64_t);
	struct kvm_regs regs = { .rip = GPA_LOW, .rflags = 2, .rsi = list, .rcx = vcpu->entries, .rdi = GPA_NOWHERE };
	sure(ioctl(vcpu->fd, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	long before = minor_faults();
	int result;
	do
		result = ioctl(vcpu->fd, KVM_RUN, 0);
	while (result < 0 && errno == EINTR);
	vcpu->faults = minor_faults() - before;
	sure(result, "KVM_RUN");
	if (vcpu->run->exit_reason != KVM_EXIT_MMIO || vcpu->run->mmio.phys_addr != GPA_NOWHERE) {
		errno = 0;
		fail("the guest left with reason %u", vcpu->run->exit_reason);
	}
	vcpu->run->immediate_exit = 1; /* completes the store */
	ioctl(vcpu->fd, KVM_RUN, 0);
	vcpu->run->immediate_exit = 0;
}

static void *vcpu_thread(void *vcpu)
{
	for (;;) {
		pthread_barrier_wait(&begin_run);
		run_guest(vcpu);
		pthread_barrier_wait(&end_run);
	}
	return 0;
}

static void run_vcpus(void)
{
	pthread_barrier_wait(&begin_run);
	pthread_barrier_wait(&end_run);
}

/* Loads from all pages but the data: code, tables, lists are mapped again, and threads' stacks are their own again. Tables
 * only with nested paging: a shadow of a table that the guest has mapped would have to be write-protected first. */
static void warm_up(void)
{
	for (int v = 0; v < c.vcpus; v++) {
		uint64_t *entry = c.lists + v * c.lists_capacity;
		for (size_t at = 0; at < (c.nested_paging ? c.low_bytes : PAGE); at += PAGE)
			*entry++ = GPA_LOW + at;
		for (size_t at = 0; at < c.lists_bytes; at += PAGE)
			*entry++ = GPA_LISTS + at;
		c.vcpu[v].entries = entry - (c.lists + v * c.lists_capacity);
	}
	run_vcpus();
	for (int v = 0; v < c.vcpus; v++)
		c.vcpu[v].entries = 0;
	run_vcpus();
}

/* 2 MiB that stay empty, in a mapping that is not: MADV_COLLAPSE refuses at once where nothing was ever written. */
static char *map_scratch(void)
{
	char *memory = mmap(0, 3 * HUGE_2M, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		fail("scratch memory");
	memory[3 * HUGE_2M - 1] = 1;
	return (char *)(((uintptr_t)memory + HUGE_2M - 1) & ~(HUGE_2M - 1));
}

/* Pages that wait in a CPU's batch hold a reference, which makes a write copy what it could reuse. MADV_COLLAPSE drains all
 * batches (lru_add_drain_all()) before it looks at the range: here one that is empty. */
static void settle(void)
{
	madvise(c.scratch, HUGE_2M, MADV_COLLAPSE);
}

static bool nested_paging(void)
{
	static const char *const PATHS[] = { "/sys/module/kvm_amd/parameters/npt", "/sys/module/kvm_intel/parameters/ept" };
	bool found = false;
	for (int i = 0; i < 2; i++) {
		FILE *file = fopen(PATHS[i], "r");
		int value = file ? fgetc(file) : 0;
		found = found || value == 'Y' || value == '1';
		if (file)
			fclose(file);
	}
	return found;
}

static void make_machine(void)
{
	c.nested_paging = nested_paging();
	c.kvm = sure(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	c.vm = sure(ioctl(c.kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	ioctl(c.vm, KVM_SET_TSS_ADDR, 0xfffbd000ul); /* Intel wants it */
	c.low_bytes = (LOW_PAGES + (c.small_guest_pages ? (c.pages + 511) / 512 : 0)) * PAGE;
	c.lists_capacity = (2 * c.pages + 4096) / 512 * 512;
	c.lists_bytes = c.vcpus * c.lists_capacity * sizeof(uint64_t);
	c.low = map_shared(c.low_bytes);
	c.lists = map_shared(c.lists_bytes);
	c.scratch = map_scratch();
	map_data();
	build_tables();
	set_slot(SLOT_LOW, GPA_LOW, c.low, c.low_bytes, 0);
	set_slot(SLOT_LISTS, GPA_LISTS, c.lists, c.lists_bytes, 0);
	set_slot(SLOT_DATA, GPA_DATA, c.data, c.pages * PAGE, 0);
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + 256 * sizeof *cpuid->entries);
	cpuid->nent = 256;
	sure(ioctl(c.kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
	for (int v = 0; v < c.vcpus; v++)
		make_vcpu(&c.vcpu[v], v, cpuid);
	free(cpuid);
	c.vm_stats = sure(ioctl(c.vm, KVM_GET_STATS_FD, 0), "KVM_GET_STATS_FD");
	find_stats(c.vm_stats, VM_STAT);
	find_stats(c.vcpu[0].stats, VCPU_STAT);
	for (int n = 0; n < COUNTERS_LEN; n++)
		if (COUNTERS[n].source == TRACEPOINT)
			open_tracepoint(n); /* before the threads begin: they inherit it */
}

static void start_vcpus(void)
{
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_BYTES); /* too small for a huge page */
	pthread_barrier_init(&begin_run, 0, c.vcpus + 1);
	pthread_barrier_init(&end_run, 0, c.vcpus + 1);
	for (int v = 0; v < c.vcpus; v++)
		if ((errno = pthread_create(&c.vcpu[v].thread, &attr, vcpu_thread, &c.vcpu[v])))
			fail("thread of vCPU %d", v);
}

/* ------------------------------------------------------------------------------------------------------------- steps */

static uint64_t number_of(const char *text, uint64_t limit)
{
	char *end;
	errno = EINVAL;
	uint64_t value = text ? strtoull(text, &end, 10) : 0;
	if (!text || end == text || *end || value > limit)
		fail("'%.40s': a number up to %llu is needed", text ? text : "", (unsigned long long)limit);
	return value;
}

typedef void each_page(void *context, uint64_t page, bool write);

static void walk_run(const char *text, each_page *each, void *context)
{
	uint64_t first, count = 1, stride = 1;
	char kind = *text, *at;
	errno = EINVAL;
	first = strtoull(text + 1, &at, 10);
	if (*at == '+')
		count = strtoull(at + 1, &at, 10);
	if (*at == '*')
		stride = strtoull(at + 1, &at, 10);
	if (!strchr("rwp", kind) || *at || count > MAX_PAGES || stride > MAX_PAGES || first > MAX_PAGES)
		fail("'%.40s' is no part of a list", text);
	for (uint64_t i = 0, page = first; i < count; i++, page += stride) {
		if (page >= c.pages)
			fail("page %llu lies outside", (unsigned long long)page);
		if (kind != 'w')
			each(context, page, false);
		if (kind != 'r')
			each(context, page, true);
	}
}

static void walk_list(char *text, each_page *each, void *context)
{
	char *rest;
	for (char *part = text ? strtok_r(text, ",", &rest) : 0; part; part = strtok_r(0, ",", &rest))
		walk_run(part, each, context);
}

static void add_entry(void *context, uint64_t page, bool write)
{
	struct vcpu *vcpu = context;
	errno = ENOSPC;
	if (vcpu->entries == c.lists_capacity)
		fail("a list of more than %llu accesses", (unsigned long long)c.lists_capacity);
	c.lists[(vcpu - c.vcpu) * c.lists_capacity + vcpu->entries++] = GPA_DATA + page * PAGE + write;
}

static void touch_page(void *context, uint64_t page, bool write)
{
	volatile char *at = c.data + page * PAGE;
	(void)context;
	if (write)
		*at = 1;
	else
		(void)*at;
}

static void do_madvise(uint64_t first, uint64_t size, int advice, const char *what)
{
	errno = EINVAL;
	if (first > c.pages || size > c.pages - first)
		fail("%s of %llu pages at %llu", what, (unsigned long long)size, (unsigned long long)first);
	sure(madvise(c.data + first * PAGE, size * PAGE, advice), what);
}

static void op_host(char **rest) { walk_list(strtok_r(0, " ", rest), touch_page, 0); }

static void op_populate(char **rest)
{
	const char *access = strtok_r(0, " ", rest);
	do_madvise(0, c.pages, access && *access == 'r' ? MADV_POPULATE_READ : MADV_POPULATE_WRITE, "MADV_POPULATE");
}

static void op_pre_fault(char **rest)
{
	struct kvm_pre_fault_memory range = { .gpa = GPA_DATA, .size = c.pages * PAGE };
	(void)rest;
	while (range.size)
		if (ioctl(c.vcpu[0].fd, KVM_PRE_FAULT_MEMORY, &range) < 0 && errno != EINTR && errno != EAGAIN)
			fail("KVM_PRE_FAULT_MEMORY");
}

static void op_dontneed(char **rest)
{
	uint64_t at[4];
	for (int i = 0; i < 4; i++)
		at[i] = number_of(strtok_r(0, " ", rest), MAX_PAGES);
	for (uint64_t call = 0; call < at[3]; call++)
		do_madvise(at[0] + call * at[2], at[1], MADV_DONTNEED, "MADV_DONTNEED");
}

static void op_collapse(char **rest)
{
	uint64_t first = number_of(strtok_r(0, " ", rest), MAX_PAGES), size = number_of(strtok_r(0, " ", rest), MAX_PAGES);
	if (first > c.pages || size > c.pages - first)
		fail("MADV_COLLAPSE outside");
	madvise(c.data + first * PAGE, size * PAGE, MADV_COLLAPSE); /* an error means that some region could not be: see the counts */
}

static void op_fork(char **rest)
{
	int ready[2];
	char byte = 0;
	(void)rest;
	sure(pipe(ready), "pipe");
	c.child = sure(fork(), "fork");
	if (!c.child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (write(ready[1], "", 1) == 1)
			for (;;)
				pause();
		_exit(1);
	}
	sure(read(ready[0], &byte, 1), "pipe");
	close(ready[0]);
	close(ready[1]);
}

static void op_child_exit(char **rest)
{
	(void)rest;
	errno = ECHILD;
	if (c.child <= 0)
		fail("child_exit");
	kill(c.child, SIGKILL);
	waitpid(c.child, 0, 0);
	c.child = 0;
}

static void op_log(char **rest)
{
	const char *state = strtok_r(0, " ", rest);
	errno = EINVAL;
	if (!state)
		fail("log needs on, off or get");
	if (strcmp(state, "get")) {
		c.logging = !strcmp(state, "on");
		set_slot(SLOT_DATA, GPA_DATA, c.data, c.pages * PAGE, c.logging ? KVM_MEM_LOG_DIRTY_PAGES : 0);
		return;
	}
	static uint64_t bitmap[(1ul << 30) / PAGE / 64];
	struct kvm_dirty_log log = { .slot = SLOT_DATA, .dirty_bitmap = bitmap };
	sure(ioctl(c.vm, KVM_GET_DIRTY_LOG, &log), "KVM_GET_DIRTY_LOG");
}

static void op_touch(char **rest)
{
	char *vcpu;
	while ((vcpu = strtok_r(0, " ", rest)))
		walk_list(strtok_r(0, " ", rest), add_entry, &c.vcpu[number_of(vcpu, c.vcpus - 1)]);
}

enum who { GUEST, VMM, CALL }; /* whose faults are counted; a CALL's own are none of the data's */
static const struct { const char *name; void (*run)(char **rest); enum who who; } STEPS[] = {
	{ "touch", op_touch, GUEST }, { "host", op_host, VMM }, { "populate", op_populate, VMM },
	{ "pre_fault", op_pre_fault, VMM }, { "dontneed", op_dontneed, CALL }, { "collapse", op_collapse, CALL },
	{ "fork", op_fork, CALL }, { "child_exit", op_child_exit, CALL }, { "log", op_log, CALL },
};

static void run_step(int number, char *text)
{
	char head[64], *rest, *name = strtok_r(text, " ", &rest);
	snprintf(head, sizeof head, "fs1 step %ld %d", c.id, number);
	for (size_t s = 0; name && s < sizeof STEPS / sizeof *STEPS; s++) {
		if (strcmp(STEPS[s].name, name))
			continue;
		bool guest = STEPS[s].who == GUEST;
		warm_up();
		settle();
		if (guest)
			STEPS[s].run(&rest); /* lists are written before counts are taken */
		take_counts(); /* once unread: the pages that taking them needs are there, then */
		struct counts before = take_counts();
		long faults = minor_faults();
		if (guest)
			run_vcpus();
		else
			STEPS[s].run(&rest);
		c.vmm_faults = STEPS[s].who == VMM ? minor_faults() - faults : 0;
		for (int v = 0; v < c.vcpus && !guest; v++)
			c.vcpu[v].faults = 0;
		struct counts after = take_counts();
		emit_counts(head, &before, &after);
		return;
	}
	errno = EINVAL;
	fail("step '%.40s' is unknown", name ? name : "");
}

static void run_case(char *line)
{
	char *steps, *rest, *head = strtok_r(line, ";", &steps);
	strtok_r(head, " ", &rest);
	c.id = number_of(strtok_r(0, " ", &rest), 1ul << 40);
	const char *backing = strtok_r(0, " ", &rest);
	for (size_t b = 0; backing && b < sizeof BACKINGS / sizeof *BACKINGS; b++)
		if (!strcmp(BACKINGS[b].name, backing))
			c.backing = &BACKINGS[b];
	errno = EINVAL;
	if (!c.backing)
		fail("backing '%.40s' is unknown", backing ? backing : "");
	c.pages = number_of(strtok_r(0, " ", &rest), MAX_PAGES);
	c.shift = number_of(strtok_r(0, " ", &rest), MAX_PAGES);
	const char *guest_page = strtok_r(0, " ", &rest);
	c.small_guest_pages = guest_page && !strcmp(guest_page, "4k");
	c.vcpus = number_of(strtok_r(0, " ", &rest), MAX_VCPUS);
	if (!c.pages || !c.vcpus)
		fail("a case needs pages and vCPUs");
	make_machine();
	start_vcpus();
	warm_up();
	warm_up();
	char head_text[40];
	snprintf(head_text, sizeof head_text, "fs1 base %ld", c.id);
	take_counts();
	struct counts before = take_counts();
	run_vcpus();
	struct counts after = take_counts();
	emit_counts(head_text, &before, &after);
	int number = 0;
	for (char *step = strtok_r(0, ";", &steps); step; step = strtok_r(0, ";", &steps))
		run_step(number++, step);
	if (c.child > 0)
		op_child_exit(0);
	emit("fs1 end %ld %d", c.id, number);
	_exit(0);
}

/* -------------------------------------------------------------------------------------------------------------- main */

static void write_setting(char *line)
{
	char path[256], value[64];
	int fd = -1;
	if (sscanf(line, "set %255s %63s", path, value) != 2 || (fd = open(path, O_WRONLY)) < 0 || write(fd, value, strlen(value)) < 0)
		emit("fs1 trouble setting %.200s: %s", line, strerror(errno));
	if (fd >= 0)
		close(fd);
}

static void in_child(char *line)
{
	int status;
	long id = strtol(line + strlen("case "), 0, 10);
	pid_t pid = fork();
	if (!pid) {
		alarm(CASE_SECONDS); /* ends the process: a case that hangs fails */
		run_case(line);
	}
	if (pid < 0 || waitpid(pid, &status, 0) < 0)
		emit("fs1 fail %ld fork: %s", id, strerror(errno));
	else if (WIFSIGNALED(status))
		emit("fs1 fail %ld ended by signal %d", id, WTERMSIG(status));
}

static void emit_kernel(void)
{
	static const char *const PARAMETERS[] = { "kvm/parameters/tdp_mmu", "kvm/parameters/eager_page_split", "kvm/parameters/nx_huge_pages",
		"kvm_amd/parameters/npt", "kvm_intel/parameters/ept" };
	struct utsname name;
	char text[1024];
	uname(&name);
	int length = snprintf(text, sizeof text, "fs1 kernel release=%s", name.release);
	for (size_t i = 0; i < sizeof PARAMETERS / sizeof *PARAMETERS; i++) {
		char path[128], value[32];
		snprintf(path, sizeof path, "/sys/module/%s", PARAMETERS[i]);
		FILE *file = fopen(path, "r");
		if (!file)
			continue;
		if (fscanf(file, "%31s", value) == 1)
			length += snprintf(text + length, sizeof text - length, " %s=%s", strrchr(path, '/') + 1, value);
		fclose(file);
	}
	emit("%s", text);
}

/* A kernel that warned or crashed has counted nothing that one could rely on. */
static void emit_trouble(void)
{
	static const char *const SIGNS[] = { "WARNING: ", "BUG: ", "Oops", "soft lockup", "rcu_sched self-detected", "general protection" };
	static char log[1 << 20];
	int length = klogctl(3, log, sizeof log - 1);
	char *rest;
	log[length > 0 ? length : 0] = 0;
	for (char *line = strtok_r(log, "\n", &rest); line; line = strtok_r(0, "\n", &rest))
		for (size_t i = 0; i < sizeof SIGNS / sizeof *SIGNS; i++)
			if (strstr(line, SIGNS[i]))
				emit("fs1 trouble %.300s", line);
}

int main(int argc, char **argv)
{
	FILE *file = argc > 1 ? fopen(argv[1], "r") : 0;
	long limit = argc > 2 ? strtol(argv[2], 0, 10) : 0, cases = 0;
	char *line = 0;
	size_t size = 0;
	if (!file) {
		fprintf(stderr, "usage: litmus CASES [SECONDS]\n");
		return 2;
	}
	emit_kernel();
	while (getline(&line, &size, file) > 0) {
		struct timespec up;
		clock_gettime(CLOCK_BOOTTIME, &up);
		line[strcspn(line, "\n")] = 0;
		if (!strncmp(line, "set ", 4))
			write_setting(line);
		else if (!strncmp(line, "case ", 5) && limit && up.tv_sec >= limit)
			emit("fs1 late %ld", strtol(line + 5, 0, 10));
		else if (!strncmp(line, "case ", 5) && ++cases)
			in_child(line);
	}
	emit_trouble();
	emit("fs1 done %ld", cases);
	return 0;
}
