# Real mode, entered and left as SDM vol. 3A 11.9 says. Interrupt frames, exceptions without error codes, segments: vol. 3B
# 22.1; what a segment register keeps from protected mode: vol. 3A 11.9.2.

    .set VECTORS, 0x6000                # the interrupt vectors, not at 0: LIDT moves them

    .code16
real_mode:
    lidt (ivt_pointer - tour_begin + 0x8000)
    mov %cr0, %eax
    and $0xFFFFFFFE, %al
    mov %eax, %cr0
    ljmp $0, $(1f - tour_begin + 0x8000)
1:  xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $STACK, %sp
    movw $(real_interrupt - tour_begin + 0x8000), VECTORS + 0x42 * 4
    movw $0, VECTORS + 0x42 * 4 + 2
    movw $(real_fault - tour_begin + 0x8000), VECTORS
    movw $0, VECTORS + 2
    movw $(real_fault - tour_begin + 0x8000), VECTORS + 12 * 4
    movw $0, VECTORS + 12 * 4 + 2
    movw $(real_fault - tour_begin + 0x8000), VECTORS + 13 * 4
    movw $0, VECTORS + 13 * 4 + 2

    smsw %ax
    and $1, %ax
    show16 "real mode: protection "
    mov %sp, (scratch - tour_begin + 0x8000)
    int $0x42
    show16 "real mode, bytes of an interrupt frame: "

    # Faults push no error code here. Each goes on at the address in resume16.
    movw $(2f - tour_begin + 0x8000), (resume16 - tour_begin + 0x8000)
    mov $1, %bx
    xor %cx, %cx
    div %cx
    xor %bx, %bx
2:  mov %bx, %ax
    show16 "real mode, division by zero taken: "
    movw $(2f - tour_begin + 0x8000), (resume16 - tour_begin + 0x8000)
    mov $0xFFFF, %si
    mov $1, %bx
    mov (%si), %ax                      # the second byte is beyond the limit
    xor %bx, %bx
2:  mov %bx, %ax
    show16 "real mode, beyond the limit refused: "

    # A segment's base is its selector times 16; FFFF:0010 is the first byte above 1 MiB, where
    # this image begins: with its multiboot header.
    mov $0xFFFF, %ax
    mov %ax, %es
    mov %es:0x10, %ax
    show16 "real mode, above 1 MiB: "
    # FS still has the limit it had in protected mode.
    mov $0x100000, %esi
    mov %fs:(%esi), %eax
    shr $16, %eax
    show16 "real mode, through a 4 GiB segment: "
    mov $0x1234, %ax
    mov %ax, %fs
    mov %fs, %ax
    show16 "real mode, any selector is good: "

    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $0x18, $(back_in_protected_mode - tour_begin + 0x8000)

real_interrupt:
    mov (scratch - tour_begin + 0x8000), %ax
    sub %sp, %ax
    iretw

real_fault:
    push %bp
    mov %sp, %bp
    mov (resume16 - tour_begin + 0x8000), %ax
    mov %ax, 2(%bp)
    pop %bp
    iretw
