# Virtual-8086 mode (SDM vol. 3B 22): entered by IRET, left through interrupts and faults. The
# monitor here lets the code run first with IOPL 3, then with IOPL 0, where the instructions that
# touch IF fault.

    .code32
virtual_8086:
    mov %esp, (monitor_esp - tour_begin + 0x8000)
    push $0x4321                        # GS, FS, DS, ES
    push $0
    push $0
    push $0
    push $0                             # SS
    push $0x6E00                        # ESP
    push $0x23002                       # VM, IOPL 3
    push $0
    push $(1f - tour_begin + 0x8000)
    iret

    .code16
1:  mov %gs, %ax
    show16 "virtual-8086 mode: gs "
    mov $0xFFFF, %ax
    mov %ax, %es
    mov %es:0x10, %ax
    show16 "virtual-8086 mode, above 1 MiB: "
    cli                                 # allowed
    pushf
    pop %ax
    and $0x3200, %ax
    show16 "virtual-8086 mode, iopl 3: flags "
    int $0x45
    show16 "virtual-8086 mode, after an interrupt: "
    hlt                                 # always refused

# The second round, with IOPL 0: each of these is refused.
second_round:
    cli
    sti
    pushf
    popf
    int $0x45
    iret
    hlt

    .code32
# Vector 0x45: an INT 3 bytes wide frame is 9 words from here (EIP, CS, EFLAGS, ESP, SS, ES, DS,
# FS, GS), and the data segments are null.
virtual_interrupt:
    mov %ds, %eax
    push %eax
    mov $0x10, %eax
    mov %eax, %ds
    pop %eax
    show32 "in the interrupt handler: ds "
    mov 8(%esp), %eax
    and $0x23000, %eax
    show32 "in the interrupt handler: saved flags "
    mov 32(%esp), %eax
    show32 "in the interrupt handler: saved gs "
    mov $0x77, %eax
    iret

# Vector 13. In virtual-8086 mode: counts, and skips the instruction. Else: a fault of a task
# switch, and resume32 says where to go on.
general_protection32:
    testl $0x20000, 12(%esp)
    jnz 1f
    pop %edx
    mov $13, %eax
    jmp resume_after_fault
1:  push %eax
    push %ebx
    mov $0x10, %eax
    mov %eax, %ds
    mov 12(%esp), %ebx                  # EIP, behind EBX, EAX and the error code
    movzbl (%ebx), %eax
    cmp $0xF4, %al                      # hlt ends a round
    je 4f
    incl (refused - tour_begin + 0x8000)
    cmp $0xCD, %al                      # int n is two bytes long
    jne 2f
    incl 12(%esp)
2:  incl 12(%esp)
3:  pop %ebx
    pop %eax
    add $4, %esp
    iret
4:  mov 8(%esp), %eax
    show32 "virtual-8086 mode, hlt: #GP error "
    mov (refused - tour_begin + 0x8000), %eax
    show32 "virtual-8086 mode, refused before: "
    testl $0x3000, 20(%esp)             # EFLAGS: which round was it?
    jz 5f
    andl $~0x3000, 20(%esp)
    movl $(second_round - tour_begin + 0x8000), 12(%esp)
    jmp 3b
5:  mov (monitor_esp - tour_begin + 0x8000), %esp
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    ret
