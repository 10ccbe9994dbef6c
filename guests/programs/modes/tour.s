# The way down and up again. Stack and scratch memory are below 0x8000, page tables from 0xC000.

    .set STACK, 0x7000

    .code64
    .global tour_entry
tour_entry:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    pushfq
    cli
    mov %rsp, (saved_rsp - tour_begin + 0x8000)
    mov %cr3, %rax
    mov %rax, (saved_cr3 - tour_begin + 0x8000)
    mov %cr4, %rax
    mov %rax, (saved_cr4 - tour_begin + 0x8000)
    sgdt (saved_gdt - tour_begin + 0x8000)
    sidt (saved_idt - tour_begin + 0x8000)
    lgdt (gdt_pointer - tour_begin + 0x8000)
    mov $STACK, %esp
    push $0x18
    push $(compatibility - tour_begin + 0x8000)
    lretq

# Compatibility mode: 32-bit code, still in long mode (SDM vol. 3A 2.2, vol. 1 3.1.1; an interrupt there: vol. 3A 7.14.1,
# 7.14.3). Operand and stack sizes are those of the code and stack segments (vol. 1 3.6, 6.2.3).
    .code32
compatibility:
    call load_flat_segments
    mov $5, %eax
    .byte 0x48, 0xFF, 0xC0              # 64-bit: inc rax; here: dec eax, inc eax
    show32 "32-bit compatibility mode: 5 is still "
    mov $1, %eax
    int $0x41
    show32 "32-bit compatibility mode, after an interrupt: "
    mov %esp, %eax
    push %ebx
    sub %esp, %eax
    pop %ebx
    show32 "32-bit compatibility mode, bytes of a push: "
    ljmp $0x20, $(compatibility16 - tour_begin + 0x8000)

    .code16
compatibility16:
    call load_16_bit_segments
    mov %sp, %ax
    push %bx
    sub %sp, %ax
    pop %bx
    show16 "16-bit compatibility mode, bytes of a push: "
    mov $0xFFFF, %eax
    .byte 0x40                          # 64-bit: a prefix; here: inc ax
    shr $16, %eax
    show16 "16-bit compatibility mode, carry into the upper half: "
    ljmpl $0x18, $(leave_long_mode - tour_begin + 0x8000)

# SDM vol. 3A 11.8.5.4: paging off leaves long mode, from code that is mapped one to one.
    .code32
leave_long_mode:
    call load_flat_segments
    mov %cr0, %eax
    and $0x7FFFFFFF, %eax
    mov %eax, %cr0
    mov $0xC0000080, %ecx
    rdmsr
    and $0x500, %eax
    show32 "paging off: efer "
    rdmsr
    and $~0x100, %eax
    wrmsr
    lidt (idt32_pointer - tour_begin + 0x8000)
    # Gates of 32 and, below, of 16 bits: SDM vol. 3A 7.11, 7.12.1.
    mov $1, %eax
    int $0x42
    show32 "protected mode, after an interrupt: "
    movl $(1f - tour_begin + 0x8000), (resume32 - tour_begin + 0x8000)
    xor %ecx, %ecx
    div %ecx
1:  show32 "protected mode, division by zero: vector "
    call legacy_paging

    mov $0x10, %eax
    mov %eax, %fs                       # keeps base 0 and the 4 GiB limit through real mode
    ljmp $0x20, $(protected16 - tour_begin + 0x8000)

    .code16
protected16:
    call load_16_bit_segments
    mov %sp, %ax
    mov %ax, (scratch - tour_begin + 0x8000)
    int $0x43                           # through a 16-bit gate
    show16 "16-bit protected mode, bytes of an interrupt frame: "
    jmp real_mode

    .code32
back_in_protected_mode:
    call load_flat_segments
    mov %gs, %eax
    mov %eax, %fs
    lidt (idt32_pointer - tour_begin + 0x8000)
    mov %cr0, %eax
    and $0x80000001, %eax
    show32 "protected mode again: cr0 "
    call tasks
    call virtual_8086

# SDM vol. 3A 11.8.5: PAE, CR3, EFER.LME, paging.
    mov (saved_cr4 - tour_begin + 0x8000), %eax
    mov %eax, %cr4
    mov (saved_cr3 - tour_begin + 0x8000), %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    and $~0x8, %eax                     # the task switches set TS
    or $0x80000000, %eax
    mov %eax, %cr0
    mov $1, %eax
    .byte 0x48, 0xFF, 0xC0
    show32 "long mode, but still 32-bit code: 1 is still "
    ljmp $0x08, $(back_in_64_bit_mode - tour_begin + 0x8000)

    .code64
back_in_64_bit_mode:
    lgdt (saved_gdt - tour_begin + 0x8000)
    lidt (saved_idt - tour_begin + 0x8000)
    mov $0x10, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov (saved_rsp - tour_begin + 0x8000), %rsp
    popfq
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .code32
load_flat_segments:
    push %eax
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %gs
    mov %ss, %eax
    cmp $0x10, %eax
    je 1f
    pop %eax                            # a 16-bit stack: start the flat one afresh
    pop %edx
    mov $0x10, %eax
    mov %eax, %ss
    mov $STACK, %esp
    jmp *%edx
1:  pop %eax
    ret

    .code16
load_16_bit_segments:
    pop %dx                             # the call's return address, whatever the stack was
    mov $0x28, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $STACK, %sp
    jmp *%dx

# Handlers of the 32-bit IDT.
    .code32
interrupt32:                            # vector 0x42
    add $0x100, %eax
    iret

divide_error32:
    mov $0, %eax
    jmp resume_after_fault

# Goes on at the address in resume32. EAX, EDX and EBX tell what happened.
page_fault32:
    mov (%esp), %edx
    mov %cr2, %ebx
    add $4, %esp
    mov $14, %eax
resume_after_fault:
    push %eax
    mov (resume32 - tour_begin + 0x8000), %eax
    mov %eax, 4(%esp)
    pop %eax
    iret

    .code16
interrupt16:                            # vector 0x43
    mov (scratch - tour_begin + 0x8000), %ax
    sub %sp, %ax
    iretw
