# The two ways of paging before long mode (SDM vol. 3A 5.3 and 5.4).

    .set DIRECTORY, 0xC000
    .set TABLE, 0xD000
    .set POINTERS, 0xE000
    .set PAE_DIRECTORY, 0xF000
    .set FRAME, 0x11000
    .set PATTERN, 0x5EED1234

    .code32
legacy_paging:
    cld
    xor %eax, %eax
    mov $DIRECTORY, %edi
    mov $0x1000, %ecx                   # four pages of tables
    rep stosl
    movl $PATTERN, FRAME

# 32-bit paging: 4 MiB pages one to one and at 3 GiB, a 4 KiB page at 4 MiB.
    movl $0x83, DIRECTORY
    movl $0x83, DIRECTORY + 768 * 4
    movl $(TABLE + 3), DIRECTORY + 4
    movl $(FRAME + 3), TABLE
    mov $0x10, %eax                     # PSE, and not PAE
    mov %eax, %cr4
    mov $DIRECTORY, %eax
    mov %eax, %cr3
    mov %cr0, %eax
    or $0x80010000, %eax                # PG, WP
    mov %eax, %cr0
    mov 0xC0000000 + FRAME, %eax
    show32 "32-bit paging, through a 4 MiB page: "
    mov 0x400000, %eax
    show32 "32-bit paging, through a 4 KiB page: "
    movl $(PATTERN + 1), 0x400000
    mov TABLE, %eax
    show32 "32-bit paging, page-table entry after a write: "
    movl $(1f - tour_begin + 0x8000), (resume32 - tour_begin + 0x8000)
    movl $0, 0x401004
1:  mov %edx, %eax
    show32 "32-bit paging, page fault: error "
    mov %ebx, %eax
    show32 "32-bit paging, page fault: address "
    mov %cr0, %eax
    and $0x7FFFFFFF, %eax
    mov %eax, %cr0

# PAE: 2 MiB pages one to one, at 3 GiB, and a no-execute one at 2 MiB.
    movl $(PAE_DIRECTORY + 1), POINTERS
    movl $(PAE_DIRECTORY + 1), POINTERS + 3 * 8
    movl $0x83, PAE_DIRECTORY
    movl $0x83, PAE_DIRECTORY + 8
    movl $0x80000000, PAE_DIRECTORY + 12
    mov $0x20, %eax                     # PAE
    mov %eax, %cr4
    mov $POINTERS, %eax
    mov %eax, %cr3
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    mov 0xC0000000 + FRAME, %eax
    show32 "pae paging, through a 2 MiB page: "
    # The CPU reads the four pointers with CR3, not later (SDM vol. 3A 5.4.1).
    movl $0, POINTERS + 3 * 8
    mov 0xC0000000 + FRAME, %eax
    show32 "pae paging, with the pointer gone from memory only: "
    movl $(1f - tour_begin + 0x8000), (resume32 - tour_begin + 0x8000)
    mov %esp, %ebp
    mov $(2f - tour_begin + 0x8000 + 0x200000), %eax
    jmp *%eax
2:  mov $0xBAD, %edx
1:  mov %ebp, %esp
    mov %edx, %eax
    show32 "pae paging, fetch from a no-execute page: error "
    mov %cr0, %eax
    and $0x7FFFFFFF, %eax
    mov %eax, %cr0
    xor %eax, %eax
    mov %eax, %cr4
    ret
